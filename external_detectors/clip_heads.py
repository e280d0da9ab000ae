"""The arithmetic of the experts `clip` and `forgery`, shared by their training and their use."""

from __future__ import annotations

from torch import Tensor

LAYERS = 11
"""Tower layers read: the output of each, from the first to the last but one of twelve."""

HEADS = ("clip", "forgery")
"""One head tells faces that a generator made as a whole, the other photos that were changed in part."""


def head_logits(state: dict[str, Tensor], statistics: Tensor) -> Tensor:
    """Logits [n] from patch statistics [n, LAYERS, 2, 768]."""
    return ((statistics.flatten(1) - state["mean"]) / state["std"]) @ state["weight"] + state["bias"]

"""The arithmetic of the expert `clip`, shared by its training and its use."""

from __future__ import annotations

from torch import Tensor

LAYERS = 8
"""Tower layers read: the output of each of the first eight of twelve. The later ones add 3 points of AUC on known
generators and more false alarms on photos of unknown cameras: 16 % instead of 9 % on portraits (LOG.md)."""

TOWER_LAYERS = 11
"""Layers that are computed and cached when features are made: as many as the embedded MLLM reads."""


def head_logits(state: dict[str, Tensor], statistics: Tensor) -> Tensor:
    """Logits [n] from patch statistics [n, LAYERS, 2, 768]."""
    return ((statistics.flatten(1) - state["mean"]) / state["std"]) @ state["weight"] + state["bias"]

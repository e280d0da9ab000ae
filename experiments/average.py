"""The average of two sets of weights of an expert, where one was trained on from the other.

    python -m experiments.average --one build/before --other build/after --name tower --out build/average

Weights that lie on one path of training can be averaged; the average often errs less on what is new than either end
(Izmailov et al., arXiv 1803.05407; Wortsman et al., arXiv 2109.01903). The new card says which two it was made of.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from external_detectors.weights_io import load_weights, save_weights
from x2dfd.cli import run_command
from x2dfd.errors import X2DFDError
from x2dfd.experts import read_card


def average(
    one: Annotated[Path, typer.Option(help="folder with weights and card")],
    other: Annotated[Path, typer.Option(help="folder with weights and card, trained on from the first")],
    name: Annotated[str, typer.Option(help="the expert")],
    out: Annotated[Path, typer.Option(help="folder for the average and its card")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="of the other in the average")] = 0.5,
) -> None:
    """Average two sets of weights."""
    cards = [read_card(folder / f"{name}.card.json") for folder in (one, other)]
    first, second = (load_weights(card, folder) for card, folder in zip(cards, (one, other), strict=True))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        raise X2DFDError(f"{one} and {other} hold other tensors", code="weights_differ")
    mixed = {k: ((1 - share) * v.float() + share * second[k].float()).to(v.dtype) for k, v in first.items()}
    made_of = {"averaged": {cards[0].sha256: round(1 - share, 3), cards[1].sha256: share}}
    save_weights(mixed, replace(cards[1], figures={**cards[1].figures, **made_of}), out)
    typer.echo(out / f"{name}.card.json")


if __name__ == "__main__":
    run_command(average)

"""Reading and writing an expert's weights: 16-bit safetensors beside a card that holds their SHA-256."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from x2dfd.errors import SetupError, X2DFDError, first_line
from x2dfd.experts import write_card
from x2dfd.faces import PREPROCESSING
from x2dfd.files import atomic_write, file_sha256
from x2dfd.types import Card


def load_weights(card: Card, folder: Path) -> dict[str, Tensor]:
    """The tensors of a card's weight file, in fp32. Raises SetupError when the file is absent, differs from the card's
    hash, was trained on other crops, is no weight file, or holds numbers that are not finite."""
    path = folder / card.weights
    if not path.is_file():
        raise SetupError(f"weights of expert {card.name!r} missing: {path}; reinstall x2dfd", code="weights_missing")
    if file_sha256(path) != card.sha256:
        raise SetupError(f"{path} differs from its card's file (SHA-256); reinstall x2dfd", code="weights_hash_differs")
    if card.preprocessing != PREPROCESSING:
        raise SetupError(f"{path} needs other crops ({card.preprocessing}); reinstall x2dfd", code="crops_differ")
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise SetupError(
            f"{path} cannot be read: {first_line(error)}; reinstall x2dfd", code="weights_unreadable"
        ) from error
    if broken := [k for k, v in tensors.items() if not v.isfinite().all()]:
        raise SetupError(f"{path}: {broken[0]} is not finite; reinstall x2dfd", code="weights_not_finite")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def save_weights(state: dict[str, Tensor], card: Card, folder: Path) -> Card:
    """Write `<name>.safetensors` and `<name>.card.json`; returns the card with its hash. Raises X2DFDError when a
    number is not finite in 16 bits, as after a training that diverged, or a figure of the card is none."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{card.name}.safetensors"
    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
    broken = [k for k, v in half.items() if not v.isfinite().all()]
    if broken:
        raise X2DFDError(
            f"expert {card.name!r}: {broken[0]} is not finite, so nothing was written", code="weights_not_finite"
        )
    try:
        json.dumps(card.to_dict(), allow_nan=False)
    except ValueError as error:
        raise X2DFDError(
            f"expert {card.name!r}: a figure of its card is not finite, so nothing was written", code="card_not_finite"
        ) from error
    with atomic_write(folder / name) as temporary:
        save_file(half, temporary)
    card = replace(card, weights=name, sha256=file_sha256(folder / name))
    write_card(folder / f"{card.name}.card.json", card)
    return card

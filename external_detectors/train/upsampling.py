"""Training of the expert `upsampling`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from external_detectors.train.loop import (
    CHOSEN_BY,
    SOURCE,
    augmented,
    balanced,
    by_method,
    by_source,
    fit,
    licence_of,
    next_version,
    source_names,
    worst,
)
from external_detectors.weights_io import WEIGHTS, save_weights, to_unit
from x2dfd.crops import load_crops
from x2dfd.faces import PREPROCESSING
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.types import Card


def upsampling(
    data: Annotated[Path, typer.Option(help="manifest of pictures that a decoder drew as a whole, and real photos")],
    state: Annotated[Path, typer.Option(help="folder for the resumable state")] = Path("build/upsampling"),
    out: Annotated[Path, typer.Option(help="folder for weights and card")] = WEIGHTS,
    hold_out: Annotated[str, typer.Option(help="methods kept out of training, comma-separated")] = "",
    steps: int = 2000,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    workers: int = 1,
) -> None:
    """A small network on the residual of neighbouring pixels: what a decoder drew as a whole."""
    from external_detectors.upsampling_net import UpsamplingNet

    torch.manual_seed(seed)
    crops = load_crops(data, workers)
    held_out = {m for m in hold_out.split(",") if m}
    mine = [i for i, s in enumerate(crops.samples) if s.label == "real" or _drawn_whole(s)]
    learnt = [i for i in mine if crops.samples[i].split == "train" and crops.samples[i].method not in held_out]
    samples = [crops.samples[i] for i in learnt]
    net = UpsamplingNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch_of(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        draw = balanced(samples, rng, "train", by_method=True)
        chosen = [learnt[next(draw)] for _ in range(batch)]
        pixels = torch.from_numpy(np.stack([augmented(crops.crops[i], rng)[0] for i in chosen]))
        return pixels, torch.tensor([float(crops.samples[i].label == "fake") for i in chosen])

    def loss_of(drawn: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = drawn
        return F.binary_cross_entropy_with_logits(net(to_unit(pixels)), labels * 0.96 + 0.02)

    def figures_of(trained: torch.nn.Module) -> dict[str, Any]:
        chosen = [i for i in mine if crops.samples[i].split == "calib" or crops.samples[i].method in held_out]
        trained.eval()
        parts = [chosen[k : k + 64] for k in range(0, len(chosen), 64)]
        with torch.inference_mode():
            said = [trained(to_unit(torch.from_numpy(np.asarray(crops.crops[part])))) for part in parts]
        scores = torch.cat(said).double().numpy() if said else np.zeros(0)
        checked = [crops.samples[i] for i in chosen]
        by = {"calib_auc_by_method": by_method(checked, scores), "real_above_half": by_source(checked, scores)}
        return by | {"worst": worst(checked, scores, held_out)}

    settings = {"data": manifest_sha256(data), "batch": batch, "lr": lr, "seed": seed, "hold_out": sorted(held_out)}
    trained, figures = fit(
        net, batch_of, loss_of, steps=steps, lr=lr, seed=seed, state=state, run=json.dumps(settings), check=figures_of
    )
    methods = sorted({s.method for s in samples if s.label == "fake"})
    card = Card(
        name="upsampling",
        version=next_version(out, "upsampling"),
        source=SOURCE,
        licence=licence_of(samples),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="Tan et al., Rethinking the Up-Sampling Operations in CNN-based Generative Network, CVPR 2024",
        blind_spot="What was scaled or compressed since a decoder drew it; decoders unlike those it was trained on; "
        "faces that were changed without a decoder.",
        trained_on=f"{len(samples)} pictures, {steps} steps of {batch}: real photos and harmless changes against "
        f"pictures drawn as a whole ({', '.join(methods)}); sources: {source_names(samples)}",
        figures={"held_out": sorted(held_out), "checkpoint": CHOSEN_BY, **figures},
    )
    save_weights(trained.state_dict(), card, out)
    print(out / f"{card.name}.card.json")


_WHOLE = ("redraw",)
"""Forge methods that draw the whole picture anew."""


def _drawn_whole(sample: Sample) -> bool:
    """The whole picture was drawn by a generator or a decoder (as opposed to a photo that was changed in part)."""
    return sample.label == "fake" and sample.df_class == "EFS" and (sample.mask is None or sample.method in _WHOLE)

"""Noise made against one expert, and what it does to the others: `python -m experiments.adversarial --data MANIFEST`.

Projected gradient descent (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018) on
the aligned crop itself, with the expert's weights known: more than an attacker has who can only hand in a file, so what
is measured is an upper bound. A report, not a claim of robustness: nothing is trained or chosen by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from eval.stats import Floats, auc
from external_detectors.weights_io import WEIGHTS, load_weights, to_unit
from x2dfd.cli import run_command
from x2dfd.crops import CropSet, load_crops
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.experts import DEFAULT, Expert, load_expert, read_card
from x2dfd.files import write_text
from x2dfd.manifest import manifest_sha256
from x2dfd.progress import progress
from x2dfd.types import Face

EPSILONS = (2, 4, 8)  # largest change of a value, of 255
STEPS = 20

Logits = Callable[[Tensor], Tensor]
"""Crops [n, 3, s, s] in -1..1 to logits of fake [n]."""


def attackable(name: str, folder: Path = WEIGHTS) -> torch.nn.Module:
    """The network of an expert that gives one logit a crop, for gradients. Raises UnknownName for the others."""
    from external_detectors.lite0 import Lite0
    from external_detectors.upsampling_net import UpsamplingNet

    nets: dict[str, Callable[[], torch.nn.Module]] = {"blending": Lite0, "upsampling": UpsamplingNet}
    if name not in nets:
        raise UnknownName("expert with a network from pixels to one logit", name, nets)
    net = nets[name]()
    net.load_state_dict(load_weights(read_card(folder / f"{name}.card.json"), folder))
    return net.eval().requires_grad_(False)


def pgd(
    logits: Logits, crops: NDArray[np.uint8], fake: NDArray[np.bool_], epsilon: int, steps: int = STEPS, seed: int = 0
) -> NDArray[np.uint8]:
    """Crops [n, s, s, 3] changed by at most `epsilon` of 255 in each value so that `logits` errs.

    Fakes are pushed towards real and reals towards fake. A random start by `seed`, steps of a quarter of `epsilon`; of
    all steps' rounded pictures the worst one is kept. Rounding stays within the bound, as it is a whole number.
    """
    if epsilon == 0:
        return crops.copy()
    clean = torch.from_numpy(np.ascontiguousarray(crops)).float()
    towards = torch.from_numpy(np.where(fake, -1.0, 1.0)).float()
    noise = torch.empty_like(clean).uniform_(-epsilon, epsilon, generator=torch.Generator().manual_seed(seed))
    best, worst = clean.clone(), torch.full((len(clean),), -torch.inf)
    for step in range(steps + 1):
        at = (clean + noise).clamp(0, 255).round().requires_grad_(True)  # the picture that would be handed in
        reached = towards * logits(to_unit(at))
        better = reached.detach() > worst
        best[better], worst[better] = at.detach()[better], reached.detach()[better]
        if step < steps:
            (gradient,) = torch.autograd.grad(reached.sum(), at)
            noise = (noise + epsilon / 4 * gradient.sign()).clamp(-epsilon, epsilon)
    return np.asarray(best.numpy(), np.uint8)


def transfer(
    attacked: str,
    logits: Logits,
    experts: Sequence[Expert],
    faces: Sequence[Face],
    fake: NDArray[np.bool_],
    *,
    epsilons: Sequence[int] = EPSILONS,
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, Any]:
    """What each expert says of crops that were changed against one of them.

    For every bound: AUC over the faces that the expert scored, mean movement of its score towards the wrong side, and
    the share of answers (at one half) that turned wrong. Raises X2DFDError when there are no faces.
    """
    if not faces:
        raise X2DFDError("no face to attack")
    crops = np.stack([f.crop for f in faces])
    clean = {e.card.name: _scores(e, faces) for e in experts}
    result: dict[str, Any] = {
        "attacked": attacked,
        "steps": steps,
        "seed": seed,
        "n_real": int((~fake).sum()),
        "n_fake": int(fake.sum()),
        "clean": {name: _measured(values, values, fake) for name, values in clean.items()},
        "epsilon": {},
    }
    parts = np.array_split(np.arange(len(faces)), max(1, len(faces) // 8))
    for epsilon in epsilons:
        work = progress(parts, f"against {attacked}, {epsilon} of 255")
        changed = np.concatenate([pgd(logits, crops[p], fake[p], epsilon, steps, seed) for p in work])
        seen = [replace(f, crop=c) for f, c in zip(faces, changed, strict=True)]
        result["epsilon"][str(epsilon)] = {
            e.card.name: _measured(clean[e.card.name], _scores(e, seen), fake) for e in experts
        }
    return result


def _scores(expert: Expert, faces: Sequence[Face]) -> Floats:
    """P(fake) of each face [n], NaN where the expert could not judge."""
    parts = [expert.judge(faces[k : k + 32]) for k in range(0, len(faces), 32)]
    return np.array([np.nan if e.score is None else e.score for part in parts for e in part])


def _measured(before: Floats, after: Floats, fake: NDArray[np.bool_]) -> dict[str, Any]:
    known = np.isfinite(before) & np.isfinite(after)
    if not known.any():
        return {"n": 0, "auc": None, "moved": None, "turned": None}
    before, after, fake = before[known], after[known], fake[known]
    towards = np.where(fake, before - after, after - before)
    turned = ((before >= 0.5) == fake) & ((after >= 0.5) != fake)
    return {
        "n": len(after),
        "auc": auc(fake.astype(np.int64), after),
        "moved": round(float(towards.mean()), 4),
        "turned": round(float(turned.mean()), 4),
    }


def faces_of(crops: CropSet, limit: int | None, seed: int = 0) -> tuple[list[Face], NDArray[np.bool_]]:
    """The faces of a crop set, `limit` of them drawn at random with as many of each label as there are."""
    rows = np.arange(len(crops.samples))
    if limit is not None and limit < len(rows):
        rng, fake = np.random.default_rng(seed), np.array([s.label == "fake" for s in crops.samples])
        reals, fakes = rng.permutation(rows[~fake]), rng.permutation(rows[fake])
        half = min(len(fakes), max(limit // 2, limit - len(reals)))
        rows = np.sort(np.concatenate([fakes[:half], reals[: limit - half]]))
    faces = []
    for i in rows:
        crop, points = np.asarray(crops.crops[i]), crops.landmarks[i]
        size = float(crop.shape[0])
        faces.append(Face(0, (0.0, 0.0, size, size), points, 1.0, crop, points, 0.0))
    return faces, np.array([crops.samples[i].label == "fake" for i in rows], bool)


def run(
    data: Annotated[Path, typer.Option(help="manifest of real and fake pictures")],
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("build/adversarial.json"),
    attack: Annotated[str, typer.Option(help="expert that the noise is made against")] = "blending",
    experts: Annotated[str, typer.Option(help="those that look at it, comma-separated")] = ",".join(DEFAULT),
    limit: Annotated[int | None, typer.Option(help="at most this many pictures, drawn at random")] = 20,
    seed: int = 0,
) -> None:
    """Attack one expert, look with all of them; a report only."""
    net = attackable(attack)
    names = dict.fromkeys([attack, *(n for n in experts.split(",") if n)])
    faces, fake = faces_of(load_crops(data), limit, seed)
    found = transfer(attack, net, [load_expert(n) for n in names], faces, fake, seed=seed)
    found = {"task": {"name": "adversarial", "version": 1}, "manifest_sha256": manifest_sha256(data)} | found
    write_text(out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(run, "Example:\n\n  python -m experiments.adversarial --data forged/manifest.jsonl --attack blending")

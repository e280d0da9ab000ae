"""What do bf16 and int8 in the tower's matrix products cost, and what do they save? Against fp32, on the same faces.

    python -m experiments.precision MANIFEST [MANIFEST ...] --limit 200

int8: torch's dynamic quantisation, weights by output channel and activations by tensor. Prints after every batch, so
that a run that is cut off has said what it found. CPU seconds, which other work on the machine hardly moves.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from x2dfd import eye, tower
from x2dfd.adapter import EMBEDDED, TOWER
from x2dfd.crops import load_crops
from x2dfd.detector import through_codec
from x2dfd.experts import Shared, load_expert
from x2dfd.types import Face

BATCH = 8


def int8_linear(weights, dtype, *names, scale=1.0, inputs=1.0, then="none"):
    weight, bias = (torch.cat([weights[f"{n}.{part}"] for n in names]) for part in ("weight", "bias"))
    weight, bias = scale * inputs * weight, scale * bias
    scales = weight.abs().amax(1).double().clamp(min=1e-8) / 127
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8), bias)
    if then == "swish":
        return lambda x: torch.nn.functional.silu(torch.ops.quantized.linear_dynamic(x, packed))
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def int8_eye(layers: int, additions: Path) -> eye.Eye:
    linear, eye._linear = eye._linear, int8_linear
    try:
        return tower.load_eye.__wrapped__(layers, additions)
    finally:
        eye._linear = linear


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("data", nargs="+", type=Path)
    asked.add_argument("--limit", type=int, default=200)
    asked.add_argument("--seed", type=int, default=0)
    args = asked.parse_args()
    sets = [load_crops(path) for path in args.data]
    rows = [(s, i) for s in sets for i in range(len(s.samples))]
    rows = [rows[k] for k in np.random.default_rng(args.seed).permutation(len(rows))[: args.limit]]
    expert, layers = load_expert("tower", EMBEDDED / "experts"), max(tower.HEAD_LAYERS)
    ways = {
        "fp32": tower.load_eye(layers, EMBEDDED / TOWER),
        "bf16": tower.load_eye(layers, EMBEDDED / TOWER, torch.bfloat16),
        "int8": int8_eye(layers, EMBEDDED / TOWER),
    }
    found, seconds = {n: [] for n in ways}, {n: [] for n in ways}
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        faces = [
            Face(k, (0.0, 0.0, 224.0, 224.0), s.landmarks[i], 1.0, np.array(s.crops[i]), s.landmarks[i], 0.0)
            for k, (s, i) in enumerate(part)
        ]
        faces = through_codec(faces)
        pixels = tower.clip_pixels(torch.from_numpy(np.stack([f.crop for f in faces])))
        for name, see in ways.items():
            with torch.inference_mode():
                start = time.process_time()
                states = see(pixels)
                seconds[name].append((time.process_time() - start) / len(part))
            found[name] += [e.score for e in expert.judge(faces, Shared(states, expert.tower))]
        fake = [s.samples[i].label == "fake" for s, i in rows[: at + len(part)]]
        said = [f"{len(fake)} faces"]
        for name in ways:
            moved = np.abs(np.subtract(found[name], found["fp32"]))
            auc = roc_auc_score(fake, found[name]) if any(fake) and not all(fake) else float("nan")
            middle, most = np.quantile(moved, [0.5, 0.9])
            cost = np.median(seconds[name])
            said.append(f"{name}: AUC {auc:.4f}, |dp| median {middle:.4f}, p90 {most:.4f}, {cost:.3f} CPU s a face")
        print("; ".join(said), flush=True)


if __name__ == "__main__":
    main()

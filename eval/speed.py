"""How long a warm verdict takes: `python eval/speed.py --out eval/results/speed.json`.

Verdict alone, verdict with rationale, and each expert, on one face, interleaved in one process; medians with the
10th and 90th percentile. The machine, its load and the versions stand in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import x2dfd
from x2dfd.faces import find_faces
from x2dfd.files import write_text


def measure(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each case, one call of every case a round: name -> median, p10, p90."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {f: round(float(np.percentile(s, q)), 4) for f, q in (("median", 50), ("p10", 10), ("p90", 90))}
        for name, s in seconds.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times warm verdicts on one face.")
    parser.add_argument("--out", type=Path, default=Path("build/speed.json"))
    parser.add_argument("--model", type=Path, help="adapter directory; default: the embedded model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    import torch
    from skimage.data import astronaut

    start = time.perf_counter()
    detector = x2dfd.load(args.model, threads=args.threads)
    loading = time.perf_counter() - start
    from PIL import Image

    pixels = np.asarray(astronaut(), np.uint8)
    image = Image.fromarray(pixels)
    face = find_faces(pixels)[0]
    look = detector.mllm.look(face.crop[None])
    questions = [f"Is number {i} shown? Answer Yes or No." for i in range(100)]
    cases: dict[str, Callable[[], object]] = {
        "verdict": lambda: detector.detect(image, rationale=False),
        "verdict and rationale": lambda: detector.detect(image),
        "find faces": lambda: find_faces(pixels),
        "look (tower and prefix)": lambda: detector.mllm.look(face.crop[None]),
        "100 cue questions, packed": lambda: detector.mllm.yes_no_packed(look, questions),
    }
    for expert in detector.experts:
        cases[f"expert {expert.card.name}, alone"] = lambda expert=expert: expert.judge([face])  # type: ignore[misc]
    result: dict[str, Any] = {
        "task": {"name": "speed", "version": 1},
        "model": detector.facts["name"],
        "seconds": measure(cases, args.rounds),
        "load_seconds": round(loading, 3),
        "rounds": args.rounds,
        "threads": args.threads,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "platform": platform.machine()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    sys.exit(main())

"""How long a warm verdict takes: `python eval/speed.py --out eval/results/speed.json` makes the committed result.

Verdict alone, verdict with rationale, and each expert by itself, on one face; each expert on eight faces at once; and
cue questions packed into few passes against one by one. What is compared takes turns in one process; medians with the
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
from numpy.typing import NDArray

import x2dfd
from x2dfd.assessment import BANK, read_questions
from x2dfd.experts import Expert
from x2dfd.faces import find_faces
from x2dfd.files import write_text
from x2dfd.mllm import LocalMLLM
from x2dfd.types import Face

Cases = dict[str, Callable[[], Any]]
AT_ONCE = (1, 8)  # faces in a call of an expert
ASKED = 100  # cue questions about one face


def timed(cases: Cases, rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, `rounds` numbers each: every case once a round, in turning order, so that none has the
    quieter machine or the warmer cache. A round before the first warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name in list(cases)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            cases[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, p10 and p90."""
    quantiles = (("median", 50), ("p10", 10), ("p90", 90))
    return {name: round(float(np.percentile(values, q)), digits) for name, q in quantiles}


def time_experts(experts: Sequence[Expert], face: Face, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds a face of each expert by itself (nothing shared): expert -> faces in a call -> median, p10, p90."""

    def case(expert: Expert, n: int) -> Callable[[], Any]:
        return lambda: expert.judge([face] * n)

    seconds = timed({f"{e.card.name} {n}": case(e, n) for e in experts for n in AT_ONCE}, rounds)
    return {
        e.card.name: {str(n): spread([1000 * s / n for s in seconds[f"{e.card.name} {n}"]], 2) for n in AT_ONCE}
        for e in experts
    }


def time_packing(mllm: Any, crop: NDArray[np.uint8], questions: Sequence[str], rounds: int) -> dict[str, Any]:
    """Questions about one crop packed, against one by one: over the same prefix, and each in a pass of its own.

    All three begin with the picture. `times_packed`: how many times as long as packed, of the same round;
    `largest_difference`: of P(yes), from the packed answer.
    """
    answers: dict[str, NDArray[np.float64]] = {}

    def packed() -> None:
        answers["packed"] = mllm.yes_no(crop, questions).p_yes

    def one_by_one() -> None:
        look = mllm.look(crop[None])
        answers["one by one, shared prefix"] = np.concatenate([mllm.yes_no_packed(look, [q]).p_yes for q in questions])

    def plain() -> None:
        answers["one by one, stock forward pass"] = mllm.yes_no_plain(crop, questions).p_yes

    cases: Cases = {"packed": packed, "one by one, shared prefix": one_by_one, "one by one, stock forward pass": plain}
    seconds = timed(cases, rounds)
    return {
        "questions": len(questions),
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_packed": {
            name: spread([a / b for a, b in zip(values, seconds["packed"], strict=True)], 2)
            for name, values in seconds.items()
            if name != "packed"
        },
        "largest_difference": {
            name: float(np.abs(p_yes - answers["packed"]).max()) for name, p_yes in answers.items() if name != "packed"
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times warm verdicts on one face, experts, and packed questions.")
    parser.add_argument("--out", type=Path, default=Path("build/speed.json"))
    parser.add_argument("--model", type=Path, help="adapter directory; default: the embedded model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--packing-rounds", type=int, default=3, help="of the questions one by one, which take long")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(args.rounds, args.packing_rounds) < 1:
        parser.error("--rounds and --packing-rounds must be 1 or more")
    import torch
    from PIL import Image
    from skimage.data import astronaut

    start = time.perf_counter()
    detector = x2dfd.load(args.model, threads=args.threads)
    mllm = detector.mllm
    if not isinstance(mllm, LocalMLLM):
        raise TypeError("a served model has no look of its own to time")
    loading = time.perf_counter() - start

    pixels = np.asarray(astronaut(), np.uint8)
    image = Image.fromarray(pixels)
    face = find_faces(pixels)[0]
    look = mllm.look(face.crop[None])
    questions = [q.text for q in read_questions(BANK)[:ASKED]]
    cases: Cases = {
        "verdict": lambda: detector.detect(image, rationale=False),
        "verdict and rationale": lambda: detector.detect(image),
        "find faces": lambda: find_faces(pixels),
        "look (tower and prefix)": lambda: mllm.look(face.crop[None]),
        f"{ASKED} cue questions, packed": lambda: mllm.yes_no_packed(look, questions),
    }
    result: dict[str, Any] = {
        "task": {"name": "speed", "version": 2},
        "model": detector.facts["name"],
        "seconds": {name: spread(values) for name, values in timed(cases, args.rounds).items()},
        "expert_ms_a_face": time_experts(detector.experts, face, args.rounds),
        "packing": time_packing(mllm, face.crop, questions, args.packing_rounds),
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

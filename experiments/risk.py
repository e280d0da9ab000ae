"""False alarms as promised and as measured: `python -m experiments.risk RUN [--allowed 0.05 --delta 0.1]`.

A threshold that 5 % of the calibration's reals reach promises 5 % on the average only. `bounded_threshold` promises it
with confidence 1 - delta (learn then test, Angelopoulos et al. 2021, arXiv 2110.01052, with the exact binomial test and
one fixed sequence of thresholds). The command splits a finished run's groups in halves, again and again: a threshold is
chosen on one half and counted on the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import binom

from eval import metrics as m
from eval.stats import Floats, Labels
from x2dfd.calibration import choose_band
from x2dfd.errors import X2DFDError

HALVES = 200
Chooser = Callable[[Floats, Labels, Sequence[str], Sequence[str]], float | None]


def bounded_threshold(real_scores: Floats, groups: Sequence[str], allowed: float, delta: float) -> float | None:
    """The lowest threshold t such that, with confidence 1 - delta, at most `allowed` of real photos score t or more.

    A group counts by its highest score, once: pictures of a group are not independent. So what is bounded is the share
    of groups with any false alarm. From the highest score down, each threshold is tested by the exact binomial
    distribution, until one fails: that needs no correction for how many there are. None where there are too few groups
    to promise anything.
    """
    _, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    worst = np.full(place.max() + 1 if len(place) else 0, -np.inf)
    np.maximum.at(worst, place, real_scores)
    n = len(worst)
    if n == 0 or binom.cdf(0, n, allowed) > delta:
        return None
    for score in np.unique(worst)[::-1]:
        if binom.cdf(int((worst >= score).sum()), n, allowed) > delta:
            return float(np.nextafter(score, np.inf))  # just above the first score that must not be reached
    return float(worst.min())


def halves(
    rows: Sequence[dict[str, Any]], allowed: float, delta: float, *, n: int = HALVES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Each way of choosing a threshold, over `n` random halves of the groups: what it promised and what came.

    `broken`: share of halves whose false alarms exceed `allowed`; a promise with confidence 1 - delta may break in
    delta of them. Over groups, as promised, and over pictures, as a reader counts.
    """
    kept = [row for row in rows if row["p_fake"] is not None]
    labels, scores = m.to_labels(r["label"] for r in kept), m.to_scores([r["p_fake"] for r in kept])
    groups, sources = np.array([r["group"] for r in kept]), np.array([r["source"] or "" for r in kept])
    names = np.unique(groups)

    def shipped(s: Floats, y: Labels, _: Sequence[str], src: Sequence[str]) -> float | None:
        return choose_band(s, y.astype(np.float64), src, false_alarms=allowed)[1]

    def bounded(s: Floats, y: Labels, g: Sequence[str], _: Sequence[str]) -> float | None:
        own = y == 0
        return bounded_threshold(s[own], np.asarray(g)[own].tolist(), allowed, delta)

    ways: dict[str, Chooser] = {"quantile per source (choose_band)": shipped, "bounded (exact binomial)": bounded}
    table = {}
    for way, choose in ways.items():
        rng = np.random.default_rng(seed)
        found: dict[str, list[float]] = {"pictures": [], "groups": [], "found": [], "threshold": []}
        none = 0
        for _ in range(n):
            first = np.isin(groups, rng.permutation(names)[: len(names) // 2])
            threshold = choose(scores[first], labels[first], groups[first].tolist(), sources[first].tolist())
            rest, fake_rest = ~first & (labels == 0), ~first & (labels == 1)
            if threshold is None or not rest.any() or not fake_rest.any():
                none += 1
                continue
            alarms = scores[rest] >= threshold
            hit = len(set(groups[rest][alarms].tolist())) / len(set(groups[rest].tolist()))
            found["pictures"].append(float(alarms.mean()))
            found["groups"].append(hit)
            found["found"].append(float((scores[fake_rest] >= threshold).mean()))
            found["threshold"].append(threshold)
        table[way] = {
            "halves": n - none,
            "no_threshold": none,
            "threshold": _mean(found["threshold"]),
            "false_alarms": _mean(found["pictures"]),
            "broken": _mean([v > allowed for v in found["pictures"]]),
            "false_alarms_groups": _mean(found["groups"]),
            "broken_groups": _mean([v > allowed for v in found["groups"]]),
            "fakes_found": _mean(found["found"]),
        }
    return table


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="False alarms as promised and as measured, on halves of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that run_bench.py detect filled")
    parser.add_argument("--allowed", type=float, default=0.05, help="share of reals that may be called fake")
    parser.add_argument("--delta", type=float, default=0.1, help="how often the promise may break")
    parser.add_argument("--halves", type=int, default=HALVES, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if not (0 < args.allowed < 1 and 0 < args.delta < 1):
            raise X2DFDError("--allowed and --delta lie between 0 and 1", code="option_out_of_range")
        try:
            columns = ["label", "group", "source", "p_fake"]
            rows = pq.read_table(args.run / "samples.parquet", columns=columns).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise X2DFDError(
                f"{args.run}: no finished run of run_bench.py detect ({error})", code="run_unreadable"
            ) from error
        table = halves(rows, args.allowed, args.delta, n=args.halves, seed=args.seed)
    except X2DFDError as error:
        print(error.line, file=sys.stderr)
        return 2
    print(json.dumps({"allowed": args.allowed, "delta": args.delta, "ways": table}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

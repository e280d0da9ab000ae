"""Compares two runs on the samples that both scored: `python eval/paired.py RUN_A RUN_B [--scorer p_fake]`.

The difference of the AUCs with a paired group bootstrap (both runs lose and keep the same groups) and DeLong's test.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import metrics as m
from eval.scoring import digest
from x2dfd.errors import UnknownName, X2DFDError


def read_run(folder: Path, scorer: str) -> dict[str, dict[str, Any]]:
    """Rows by id: label, group, score. Raises X2DFDError where there is no run, or no such column."""
    path = folder / "samples.parquet"
    try:
        names = pq.read_schema(path).names
        if scorer not in names:
            numbers = [n for n in names if n.startswith(("p_", "expert:"))]
            raise UnknownName("scorer", scorer, numbers)
        rows = pq.read_table(path, columns=["id", "label", "group", scorer]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise X2DFDError(f"{folder}: no finished run of run_bench.py ({error})") from error
    return {row["id"]: {"label": row["label"], "group": row["group"], "score": row[scorer]} for row in rows}


def read_scores(folder: Path, result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Scorer -> rows by id, of every score in the table beside a result file (its content is `result`).

    Raises X2DFDError where there is no table, or it is that of another run.
    """
    path = folder / "samples.parquet"
    if not path.is_file():
        raise X2DFDError("no samples.parquet beside the reference")
    try:
        schema = pq.read_schema(path)
        seen = pq.read_table(path, columns=["id", "sha256"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise X2DFDError(f"{path} cannot be read ({error})") from error
    head = json.loads((schema.metadata or {}).get(b"x2dfd", b"{}"))
    model, stated = (part.get("model", {}) for part in (head.get("origin", {}), result))
    pictures = digest([row["id"], row["sha256"]] for row in seen)
    same = all(stated.get("stated", {}).get(name) == value for name, value in model.items())
    if not same or pictures != result.get("data", {}).get("pictures_sha256"):
        raise X2DFDError("samples.parquet beside the reference is of another run")
    return {name: read_run(folder, name) for name in schema.names if name.startswith(("p_", "expert:"))}


def paired(
    first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]], *, n: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """AUC of both, and their difference (first minus second) with its interval and p; on the common samples alone.

    Raises X2DFDError when the runs call one sample by different labels or groups, or share none.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise X2DFDError("the runs share no sample")
    if other := [i for i in common if any(first[i][k] != second[i][k] for k in ("label", "group"))]:
        raise X2DFDError(f"the runs know {len(other)} samples by another label or group, such as {other[0]}")
    kept = [i for i in common if None not in (first[i]["score"], second[i]["score"])]
    labels = m.to_labels(first[i]["label"] for i in kept)
    a, b = (m.to_scores([run[i]["score"] for i in kept]) for run in (first, second))
    groups = [first[i]["group"] for i in kept]

    def difference(index: m.Labels, _: m.Floats) -> float | None:
        mine = labels[index]
        one, two = m.rank_auc(mine, a[index]), m.rank_auc(mine, b[index])
        return None if one is None or two is None else one - two

    # The metric is told which samples were drawn: the index travels in the place of the labels.
    at = np.arange(len(kept))
    interval = m.bootstrap_interval(difference, at, np.zeros(len(kept)), groups, n, seed)
    return {
        "n": len(kept),
        "n_first_only": len(first.keys() - second.keys()),
        "n_second_only": len(second.keys() - first.keys()),
        "n_unscored": len(common) - len(kept),
        "auc": [m.auc(labels, a), m.auc(labels, b)],
        "difference": {"value": difference(at, a), "interval": list(interval) if interval else None},
        "delong": m.delong(labels, a, b),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares two runs on the samples that both scored.")
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="folders that run_bench.py filled")
    parser.add_argument("--scorer", default="p_fake", help="p_fake, p_mllm, expert:NAME; of both (default: p_fake)")
    parser.add_argument("--second-scorer", help="of the second run, where it is another")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        scorers = (args.scorer, args.second_scorer or args.scorer)
        runs = [read_run(run, scorer) for run, scorer in zip(args.runs, scorers, strict=True)]
        found = paired(*runs, n=args.bootstrap, seed=args.seed)
    except X2DFDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

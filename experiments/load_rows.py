"""Load on the runner of manifests: `python -m experiments.load_rows --out build/load_rows.json`.

`x2dfd detect --manifest` over 1,000,000 rows with a stub in the model's place, which reads no picture: what is measured
is what the runner itself costs. The memory of the process is read as it goes, writing the table included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.stub import run
from x2dfd.files import write_text


class Memory(threading.Thread):
    """Reads this process's memory twice a second: (seconds, MiB)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.curve: list[tuple[float, float]] = []
        self.stop = threading.Event()
        self._start = time.perf_counter()

    def run(self) -> None:
        while not self.stop.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self.curve.append((round(time.perf_counter() - self._start, 1), round(mib, 1)))


def write_names(path: Path, count: int) -> None:
    """A Parquet manifest of `count` paths, written in parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("path", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 50_000):
            names = [f"pictures/{i:07}.jpg" for i in range(start, min(start + 50_000, count))]
            writer.write_table(pa.table({"path": names}, schema=schema))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs `x2dfd detect --manifest` over many rows with a stub model.")
    parser.add_argument("--out", type=Path, default=Path("build/load_rows.json"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("parquet", "jsonl"), default="parquet")
    args = parser.parse_args(argv)
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        manifest, table = Path(folder, "names.parquet"), Path(folder, f"rows.{args.kind}")
        write_names(manifest, args.rows)
        memory = Memory()
        memory.start()
        start = time.perf_counter()
        stub = run(manifest, table, "--batch-size", "64")
        seconds = time.perf_counter() - start
        memory.stop.set()
        memory.join()
        size = table.stat().st_size
        if args.kind == "parquet":
            found = pq.read_table(table, columns=["path", "error_code"]).to_pydict()
            paths, failures = found["path"], sum(code is not None for code in found["error_code"])
        else:
            rows = [(row["path"], row["error_code"]) for row in map(json.loads, table.open(encoding="utf-8"))]
            paths, failures = [path for path, _ in rows], sum(code is not None for _, code in rows)
    curve = memory.curve[:: max(1, len(memory.curve) // 40)]
    early = [mib for when, mib in memory.curve if when > seconds / 10] or [0.0]
    in_order = all(int(Path(path).stem) == i for i, path in enumerate(paths))
    result: dict[str, Any] = {
        "task": {"name": "load_rows", "version": 1},
        "rows": args.rows,
        "judged": stub.judged,
        "written": len(paths),
        "whole_and_in_order": in_order and len(paths) == args.rows,
        "failures": failures,
        "table_mib": round(size / 2**20, 1),
        "seconds": round(seconds, 1),
        "rows_per_second": round(args.rows / seconds),
        "memory_mib": {"curve": curve, "after_a_tenth": early[0], "most": max(early)},
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "platform": platform.machine()},
        "python": platform.python_version(),
    }
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    for when, mib in curve:
        print(f"{when:>7.1f} s  {mib:>7.1f} MiB  {'#' * int(mib // 8)}", file=sys.stderr)
    print(json.dumps(result))
    return 0 if result["whole_and_in_order"] else 1


if __name__ == "__main__":
    sys.exit(main())

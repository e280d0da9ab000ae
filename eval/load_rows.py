"""Load on the runner of manifests: `python eval/load_rows.py --out build/load_rows.json`.

`x2dfd detect --manifest` over 1,000,000 rows with a stub in the model's place, which reads no picture: what is measured
is what the runner itself costs. The memory of the process is read as it goes, writing the table included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import x2dfd
from x2dfd import cli
from x2dfd.files import write_text
from x2dfd.types import Evidence, FaceReport, Failure, Report, Verdict

FAILS = 1000  # every so manieth file cannot be judged


class StubDetector:
    """Gives each path a verdict that follows from its name; kills its process before the file `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.facts: dict[str, Any] = {"name": "stub", "mode": "paper", "threshold": 0.5, "band": None}
        self.judged = 0
        self._dies_at = dies_at

    def detect_many(
        self, sources: Iterable[Path], *, batch_size: int = 8, rationale: bool = True, frames: int = 32
    ) -> Iterator[Report | Failure]:
        for source in sources:
            if self.judged == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.judged += 1
            yield self._judge(source)

    def _judge(self, source: Path) -> Report | Failure:
        name = hashlib.sha256(source.name.encode())
        number = int.from_bytes(name.digest()[:4])
        if number % FAILS == 0:
            return Failure(str(source), None, "not_an_image", "the stub does not like its name")
        digest = hashlib.sha256(source.read_bytes()) if source.is_file() else name
        verdict = Verdict("fake" if number % 2 else "real", number / 2**32)
        evidence = (Evidence("blending", 0.25), Evidence("clip", None, "no weights"))
        face = FaceReport(0, (1.0, 2.0, 30.0, 40.0), 0.9, verdict, verdict.p_fake, "", (), evidence)
        return Report(
            str(source), digest.hexdigest(), {"kind": "image"}, verdict, (face,), "", (), evidence, {"state": "absent"},
            self.facts, {}, {},
        )  # fmt: skip


def run(manifest: Path, out: Path, *options: str, dies_at: int | None = None) -> StubDetector:
    """The command on a manifest, with the stub as its model."""
    stub = StubDetector(dies_at)
    loaded = x2dfd.load
    vars(x2dfd)["load"] = lambda *_, **__: stub
    try:
        cli.app(["detect", "--manifest", str(manifest), "--out", str(out), *options], standalone_mode=False)
    finally:
        vars(x2dfd)["load"] = loaded
    return stub


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

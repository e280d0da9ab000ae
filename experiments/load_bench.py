"""Load on the benchmark runner: `python -m experiments.load_bench --out build/load_bench.json`.

`run_bench.py detect` over 20,000 pictures in a folder, each decoded and re-encoded as in any run, with a stub in the
model's place. Once straight, once killed in the middle and run again: both have to end in the same result file. The
memory of each process is read as it goes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import x2dfd
from eval import command
from experiments.load_rows import Memory
from x2dfd.files import write_text
from x2dfd.types import Evidence, FaceReport, Failure, ModelInfo, Report, Verdict

SIDE = 96  # of a picture
BROKEN = 1000  # every so manieth file is no picture


class StubDetector:
    """A verdict that follows from the picture's bytes; kills its process before picture number `dies_at`."""

    mode = "calibrated"
    calibration = None

    def __init__(self, dies_at: int | None = None) -> None:
        self.info = ModelInfo("stub", {}, mode=self.mode, threshold=0.6, band=[0.4, 0.6])
        self.judged = 0
        self.last = 0.0  # when, by time.perf_counter()
        self._dies_at = dies_at

    def detect_many(
        self, sources: Sequence[bytes], *, batch_size: int = 8, rationale: bool = True
    ) -> Iterator[Report | Failure]:
        for source in sources:
            if self.judged == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.judged += 1
            self.last = time.perf_counter()
            digest = hashlib.sha256(source)
            p = int.from_bytes(digest.digest()[:4]) / 2**32
            verdict = Verdict("fake" if p >= 0.6 else "real" if p < 0.4 else "inconclusive", p)
            evidence = (Evidence("blending", p**2), Evidence("clip", None, "no weights"))
            face = FaceReport(0, (1.0, 2.0, 30.0, 40.0), 0.9, verdict, p, "", (), evidence)
            yield Report(
                None,
                digest.hexdigest(),
                {"kind": "image"},
                verdict,
                (face,),
                "",
                (),
                evidence,
                {},
                self.info.to_dict(),
                {},
                {},
            )


def write_pictures(folder: Path, count: int) -> Path:
    """`count` small pictures, no two alike, and their manifest."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "method", "source", "group"])
        for i in range(count):
            name = f"pictures/{i:06}.jpg"
            if i % BROKEN == BROKEN - 1:
                (folder / name).write_bytes(b"no picture")
            else:
                small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(small).resize((SIDE, SIDE)).save(folder / name, quality=80)
            fake = i % 2 == 1
            kind = ("fake", "swap") if fake else ("real", "none")
            writer.writerow([name, *kind, f"camera{i // 2 % 3}", f"g{i // 4}"])
    return manifest


def judge_all(manifest: Path, out: Path, dies_at: int | None) -> dict[str, Any]:
    """One run of the command in this process: seconds, memory, pictures judged."""
    stub = StubDetector(dies_at)
    vars(x2dfd)["load"] = lambda *_, **__: stub
    memory = Memory()
    memory.start()
    start = time.perf_counter()
    code = command.main(["detect", "--data", str(manifest), "--out", str(out)])
    seconds = time.perf_counter() - start
    memory.stop.set()
    memory.join()
    told = {"exit": code, "judged": stub.judged, "judging_seconds": round(stub.last - start, 1)}
    return told | {"seconds": round(seconds, 1), "curve": memory.curve}


def child(manifest: Path, out: Path, dies_at: int | None = None) -> tuple[int, dict[str, Any]]:
    """`judge_all` in a process of its own: its exit status, and what it told before it ended ({} when killed)."""
    words = [sys.executable, "-m", "experiments.load_bench", "--judge", str(manifest), "--into", str(out)]
    words += ["--dies-at", str(dies_at)] if dies_at is not None else []
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    return done.returncode, json.loads(last[0]) if last else {}


def measure(count: int, folder: Path) -> dict[str, Any]:
    """Straight, then killed in the middle and run again, on the same pictures."""
    manifest = write_pictures(folder, count)
    _, straight = child(manifest, folder / "straight")
    killed, _ = child(manifest, folder / "cut", dies_at=count // 2)
    kept = sum(len(p.read_text("utf-8").splitlines()) - 1 for p in (folder / "cut" / "parts").glob("*.jsonl"))
    _, resumed = child(manifest, folder / "cut")
    results = [(folder / name / "result.json").read_bytes() for name in ("straight", "cut")]
    result = json.loads(results[0])
    curve: list[list[float]] = straight["curve"]
    judging = [mib for when, mib in curve if straight["judging_seconds"] / 10 < when < straight["judging_seconds"]]
    return {
        "task": {"name": "load_bench", "version": 1},
        "pictures": count,
        "failures": result["failures"],
        "scored": result["scorers"]["calibrated"]["n_scored"],
        "straight": {k: straight[k] for k in ("judged", "judging_seconds", "seconds")},
        "pictures_per_second": round(count / straight["judging_seconds"], 1),
        "killed": {"signal": -killed, "rows_kept": kept},
        "resumed": {k: resumed[k] for k in ("judged", "seconds")},
        "same_result_file": results[0] == results[1],
        "memory_mib": {
            "after_a_tenth": judging[0] if judging else None,
            "when_all_were_judged": judging[-1] if judging else None,
            "most": max((mib for _, mib in curve), default=None),  # rows read back, metrics and intervals included
            "curve": curve[:: max(1, len(curve) // 40)],
        },
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "platform": platform.machine()},
        "python": platform.python_version(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs `run_bench.py detect` over many pictures with a stub model.")
    parser.add_argument("--out", type=Path, default=Path("build/load_bench.json"))
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dies-at", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.judge:
        told = judge_all(args.judge, args.into, args.dies_at)
        print(json.dumps(told))
        return int(told["exit"])
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.pictures, Path(folder))
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["same_result_file"] and result["killed"]["signal"] == signal.SIGKILL else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does a real engine give the numbers of the local model? Splits an adapter, serves it with vLLM, asks both.

python -m experiments.serve_engine --vllm ENV/bin/vllm --base BASE --adapter DIR --out build/engine

`--vllm` is the command of an environment of its own: engines pin other libraries. On a CPU, vLLM's CPU build; its
attention needs heads of at least 32 numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

import x2dfd
from finetune.split import RANKS, split
from x2dfd import prompts
from x2dfd.adapter import probe_crops
from x2dfd.served import ServedMLLM

CUES = [f"Is the {area} blurred? {prompts.CUE_ENDING}" for area in ("jaw", "nose", "skin")]


def wait(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit(f"the engine ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5).read()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(2)
    sys.exit("the engine did not answer in time")


def compare(local: Any, url: str, adapter: Path) -> None:
    """Print what both answer, and load the adapter on the engine, which checks the card's probe pictures."""
    engine = ServedMLLM(url, "x2dfd", continues=True, timeout=600.0)
    crops = probe_crops()
    questions = [prompts.QUESTION] * len(crops)
    start = prompts.rationale_start("fake")
    rows: dict[str, list[Any]] = {
        "verdict": [m.verdict_logits(m.encode(crops), questions).tolist() for m in (local, engine)],
        "p_yes": [m.yes_no(crops[0], CUES).p_yes.tolist() for m in (local, engine)],
        "texts": [m.write(m.encode(crops), questions, [start] * len(crops), max_new_tokens=8) for m in (local, engine)],
    }
    gaps = {k: float(np.abs(np.subtract(*rows[k])).max()) for k in ("verdict", "p_yes")}
    print(json.dumps({**rows, "largest difference": gaps}, indent=1), flush=True)
    x2dfd.load(f"x2dfd@{url}+{adapter}", mode="paper", experts=())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", help="command that starts the engine; without it, one answers at --port already")
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/engine"))
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--options", default="", help="further ones of vllm serve")
    parser.add_argument("--seconds", type=float, default=600.0, help="for the engine to start")
    args = parser.parse_args()
    local = x2dfd.load(f"hub:{args.base}+{args.adapter}", mode="paper", experts=(), device="cpu", dtype="fp32").mllm
    url = f"http://127.0.0.1:{args.port}/v1"
    if args.vllm is None:
        return compare(local, url, args.adapter)
    whole, lora, rank = split(f"hub:{args.base}+{args.adapter}", args.out)
    allowed = next(r for r in RANKS if r >= rank)
    command = [args.vllm, "serve", str(whole), "--enable-lora", "--max-lora-rank", str(allowed), "--port"]
    command += [str(args.port), "--lora-modules", f"x2dfd={lora}", "--limit-mm-per-prompt", '{"image": 1}']
    command += ["--max-logprobs", "20", *shlex.split(args.options)]
    with (args.out / "engine.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait(url, server, args.seconds)
            compare(local, url, args.adapter)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(60)


if __name__ == "__main__":
    main()

"""Load on the client of served models: `python -m experiments.load_served --out build/load_served.json`.

10,000 verdict requests, 64 at a time, against the stand-in server in a process of its own, while a share of them fails,
is late or breaks off. Each answer is a function of its question, so that one that is lost, doubled or put to another
question is found. The client's memory is read as it goes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tests.stand_in import Faults, Reply, Request, StandIn, question_of
from x2dfd.files import write_text

PERIOD = 997  # different answers


def wanted(number: int) -> float:
    """P(fake) that the server gives to question `number`."""
    return (number % PERIOD + 1) / (PERIOD + 1)


def answer(request: Request) -> Reply:
    """The answer to "... number N"; the text of the question is all that the server looks at."""
    p = wanted(int(question_of(request).split()[-1]))
    return Reply(" fake", {" fake": math.log(p), " real": math.log(1 - p)}, delay=0.2)


def serve(pipe: Connection, faults: Faults) -> None:
    """The server's process: tells its address, and on any word its counts."""
    with StandIn(answer, faults=faults, keep=False) as endpoint:
        pipe.send(endpoint.url)
        pipe.recv()
        pipe.send({"answered": endpoint.answered, "most_at_a_time": endpoint.most, "faults": endpoint.faults.counts})


def resident_mib() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Loads the client of served models with requests that partly fail.")
    parser.add_argument("--out", type=Path, default=Path("build/load_served.json"))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--errors", type=float, default=0.05, help="share answered with 500 or 429")
    parser.add_argument("--slow", type=float, default=0.01, help="share that comes after the client's time-out")
    parser.add_argument("--cut", type=float, default=0.01, help="share whose connection breaks in the answer")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds the client waits for one try")
    args = parser.parse_args(argv)
    faults = Faults(args.errors, args.slow, args.cut, seconds=args.timeout + 0.5, seed=1)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, faults), daemon=True)
    server.start()
    url = pipe.recv()

    from x2dfd.served import Pictures, ServedMLLM

    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    model = ServedMLLM(url, "m", concurrency=args.concurrency, timeout=args.timeout)
    noise = np.random.default_rng(0).integers(0, 16, (args.concurrency, 224, 224, 3))
    slope = np.arange(224)[:, None] // 2 + np.arange(224)[None] // 4  # about as many bytes as a face
    urls = model.look((slope[..., None] + noise).astype(np.uint8)).urls
    chunk = 8 * args.concurrency  # one call; its stragglers hold up the next
    wrong, memory = 0, [(0, resident_mib())]
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, args.requests, chunk):
        numbers = range(first, min(first + chunk, args.requests))
        look = Pictures(tuple(urls[i % len(urls)] for i in numbers))
        logits = model.verdict_logits(look, [f"Is this image real or fake? number {i}" for i in numbers])
        p = [wanted(i) for i in numbers]
        wrong += int((~np.isclose(logits, [math.log(x / (1 - x)) for x in p], atol=1e-9)).sum())
        memory.append((numbers[-1] + 1, resident_mib()))
        print(f"{numbers[-1] + 1:>6} of {args.requests}  {memory[-1][1]:.1f} MiB", file=sys.stderr)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    pipe.send("done")
    told = pipe.recv()
    server.join(10)
    warm = [m for n, m in memory if n >= args.requests // 5] or [memory[-1][1]]
    result: dict[str, Any] = {
        "task": {"name": "load_served", "version": 1},
        "requests": args.requests,
        "wrong_or_lost": wrong,
        "concurrency": args.concurrency,
        "picture_kib": round(len(urls[0]) / 1024, 1),
        "server": told,
        "seconds": round(seconds, 2),
        "client_cpu_seconds": round(cpu, 2),
        "requests_per_second": round(args.requests / seconds, 1),
        "memory_mib": {"curve": memory, "growth_after_a_fifth": round(max(warm) - warm[0], 1)},
        "client": {"timeout": args.timeout, "retries": "5, growing pauses"},
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "platform": platform.machine()},
        "python": platform.python_version(),
    }
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

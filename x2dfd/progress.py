"""Progress of long work on stderr: a bar on a terminal, elsewhere (a log) a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

LINE_SECONDS = 30.0  # between two lines where stderr is no terminal
T = TypeVar("T")


def progress(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, and show on stderr how far they are. `total`: their number, if `items` has no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, text, total=total, console=Console(stderr=True), transient=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= LINE_SECONDS:
            last = now
            whole, left = "", ""
            if total is not None:
                seconds = int((total - done) * (now - start) / done)
                whole, left = f" of {total:,}", f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
            print(f"{text}: {done:,}{whole}, {done / (now - start):.1f}/s{left}", file=sys.stderr, flush=True)
        yield item

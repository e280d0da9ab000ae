"""`python -m app [--model DIR] [--host ADDRESS] [--port N]`: the chat demo in a browser."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import x2dfd
from x2dfd.errors import SetupError, X2DFDError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def make_examples(folder: Path) -> list[tuple[str, Path]]:
    """A real photo and its forged twin to click, made from the portrait that scikit-image carries; none without it."""
    if find_spec("skimage") is None:
        return []
    from data_gen.demo import make_pair

    real, forged = make_pair(folder)
    return [("Try a real photo", real), ("Try its forged twin", forged)]


def run(models: Sequence[Path], host: str, port: int) -> None:
    """Load the first model (none: the embedded one) and serve the page until it is stopped.

    The others are loaded when a visitor picks them. Raises X2DFDError for what a user can mend.
    """
    if find_spec("gradio") is None:
        raise SetupError("the demo needs gradio: pip install -c constraints.txt '.[app]'")
    from app.demo import build, launch

    if host not in LOOPBACK:
        print(f"note: everyone who can reach {host}:{port} can use this page; it asks for no password", file=sys.stderr)
    detector = x2dfd.load(models[0] if models else None)
    others: dict[str, Callable[[], Any]] = {str(model): partial(x2dfd.load, model) for model in models[1:]}
    if models:
        others["embedded"] = x2dfd.load
    name = str(models[0]) if models else "embedded"
    with tempfile.TemporaryDirectory(prefix="x2dfd-") as folder:
        page = build(detector, make_examples(Path(folder)), name=name, others=others)
        print(f"open http://{host}:{port} in a browser; Ctrl+C stops it", file=sys.stderr)
        try:
            launch(page, host, port)
        except OSError as error:
            raise SetupError(f"cannot listen on {host}:{port} ({error}); give another port with --port") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="Upload a photo or a short video, see the verdict and its reasons, ask about it.",
        epilog="examples: python -m app    python -m app --model build/adapter --port 8000",
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", action="append", default=[],
        help="model directory; without it, the embedded model; given again, visitors can pick one of them",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    given = parser.parse_args()
    try:
        run(given.model, given.host, given.port)
    except X2DFDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""`python -m app [--model DIR] [--host ADDRESS] [--port N]`: the chat demo in a browser."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

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


def run(model: Path | None, host: str, port: int) -> None:
    """Load the model and serve the page until it is stopped. Raises X2DFDError for what a user can mend."""
    if find_spec("gradio") is None:
        raise SetupError("the demo needs gradio: pip install -c constraints.txt '.[app]'")
    from app.demo import build, launch

    if host not in LOOPBACK:
        print(f"note: everyone who can reach {host}:{port} can use this page; it asks for no password", file=sys.stderr)
    detector = x2dfd.load(model)
    with tempfile.TemporaryDirectory(prefix="x2dfd-") as folder:
        page = build(detector, make_examples(Path(folder)))
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
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory; without it, the embedded model")
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

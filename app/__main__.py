"""`python -m app [--model DIR] [--served URL --model NAME] [--host ADDRESS] [--port N]`: the chat demo in a browser."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import x2dfd
from app.guard import LOOPBACK
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.worker import isolating

UPLOAD_SECONDS = 120.0  # of CPU to decode one upload


def make_examples(folder: Path) -> list[tuple[str, Path]]:
    """Files to click, one for each answer and a clip, made from pictures that scikit-image carries; none without it."""
    if find_spec("skimage") is None:
        return []
    from PIL import Image, ImageFilter
    from skimage.data import chelsea

    from data_gen.demo import make_pair

    real, forged = make_pair(folder)
    blurred, cat, clip = folder / "blurred.jpg", folder / "cat.jpg", folder / "clip.mp4"
    with Image.open(real) as photo:
        photo.filter(ImageFilter.GaussianBlur(2.5)).save(blurred, quality=95)
    Image.fromarray(chelsea()).save(cat, quality=95)
    _write_clip(clip, real, forged)
    return [
        ("a real photo", real), ("its forged twin", forged), ("a blurred copy", blurred), ("a cat", cat),
        ("a clip, forged in its middle", clip),
    ]  # fmt: skip


def _write_clip(path: Path, real: Path, forged: Path, seconds: int = 5, rate: int = 12) -> None:
    """The photo as a clip, with its forged twin in the middle third."""
    import av
    from PIL import Image

    with Image.open(real) as photo, Image.open(forged) as twin, av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=rate, width=photo.width, height=photo.height)
        stream.pix_fmt, stream.bit_rate = "yuv420p", 12_000_000
        for number in range(seconds * rate):
            shown = twin if seconds * rate <= 3 * number < 2 * seconds * rate else photo
            container.mux(stream.encode(av.VideoFrame.from_image(shown)))
        container.mux(stream.encode(None))


def listed(
    models: Sequence[str] = (), served: str | None = None, adapter: Path | None = None
) -> dict[str, Callable[[], Any]]:
    """What loads each model of the page's list, by its name there: those asked for, then the embedded one.

    With `served`, `models` are names at that endpoint, and `adapter` the directory that it serves under the only name.
    Raises SetupError when these do not fit together.
    """
    if served is None and adapter is not None:
        raise SetupError(
            "--adapter says what an endpoint serves: give --served too, or the directory as --model",
            code="adapter_without_served",
        )
    if served is not None and (not models or (adapter is not None and len(models) > 1)):
        raise SetupError(
            "--served needs --model NAME, a name at the endpoint, and just one beside --adapter",
            code="served_name_missing",
        )
    if "embedded" in models:
        raise SetupError(
            "embedded is the shipped model, which is on the list anyway; write a folder of yours ./embedded",
            code="name_reserved",
        )
    found: dict[str, Callable[[], Any]] = {}
    for model in models:
        if served is None:
            found[model] = partial(x2dfd.load, Path(model))
        else:
            found[f"{model} at {urlsplit(served).netloc}"] = partial(x2dfd.load, model, served=served, adapter=adapter)
    return found | {"embedded": x2dfd.load}


def run(
    models: Sequence[str],
    host: str,
    port: int,
    *,
    served: str | None = None,
    adapter: Path | None = None,
    root_path: str = "",
    names: Sequence[str] = (),
) -> None:
    """Load the first model of the list and serve the page until it is stopped; a visitor's pick loads the others.

    Arguments as for `listed` and `app.demo.launch`. Uploads are removed when it stops.
    Raises X2DFDError for what a user can mend.
    """
    if find_spec("gradio") is None:
        raise SetupError("the demo needs gradio: pip install -c constraints.txt '.[app]'", code="package_missing")
    from app.demo import build, launch

    (name, load), *others = listed(models, served, adapter).items()
    if host not in LOOPBACK:
        print(f"note: everyone who can reach {host}:{port} can use this page; it asks for no password", file=sys.stderr)
    detector = load()
    with tempfile.TemporaryDirectory(prefix="x2dfd-") as folder, isolating(UPLOAD_SECONDS):
        # Gone with the folder when it stops, unless whoever starts it names another place.
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(folder) / "uploads"))
        page = build(
            detector, make_examples(Path(folder)), name=name, others=dict(others),
            sends_to=urlsplit(served).netloc if served else "",
        )  # fmt: skip
        print(f"open http://{host}:{port} in a browser; Ctrl+C stops it", file=sys.stderr)
        try:
            launch(page, host, port, root_path=root_path, names=names)
        except OSError as error:
            raise SetupError(
                f"cannot listen on {host}:{port} ({error}); give another port with --port", code="port_unavailable"
            ) from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="Upload a photo or a short video, see the verdict and its reasons, ask about it.",
        epilog="examples: python -m app    python -m app --model build/adapter --port 8000    "
        "python -m app --served http://localhost:8000/v1 --model x2dfd --adapter DIR",
    )
    parser.add_argument(
        "--model", metavar="DIR", action="append", default=[],
        help="model directory, or with --served a name there; without it, the embedded model; given again, visitors "
        "can pick one of them",
    )  # fmt: skip
    parser.add_argument(
        "--served", metavar="URL",
        help="OpenAI-compatible endpoint that serves the models; cut-out faces are sent there. Key: OPENAI_API_KEY",
    )  # fmt: skip
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter that the endpoint serves as --model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    parser.add_argument("--root-path", default="", metavar="/PATH", help="the path under which a proxy shows the page")
    parser.add_argument(
        "--name", action="append", default=[], metavar="HOST",
        help="a host name by which browsers call the page, as behind a proxy; others are then refused",
    )  # fmt: skip
    given = parser.parse_args()
    # A service manager's stop must end it as Ctrl+C does: uploads and samples are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(
            given.model, given.host, given.port, served=given.served, adapter=given.adapter,
            root_path=given.root_path, names=given.name,
        )  # fmt: skip
    except X2DFDError as error:
        print(error.line, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the page was up
        sys.exit(130)


if __name__ == "__main__":
    main()

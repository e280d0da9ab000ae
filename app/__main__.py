"""`python -m app [--model SPEC] [--host ADDRESS] [--port N]`: the chat demo in a browser."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

import x2dfd
from app.guard import LOOPBACK
from x2dfd import options
from x2dfd.addresses import check_host
from x2dfd.cli import run_command, wait_passively
from x2dfd.errors import SetupError
from x2dfd.model_spec import LoadOptions, ModelSpec
from x2dfd.worker import isolating

if TYPE_CHECKING:
    from x2dfd.detector import Detector

UPLOAD_SECONDS = 120.0  # of CPU to decode one upload


def make_examples(folder: Path) -> list[tuple[str, Path]]:
    """Example files, one for each answer and a clip, made from scikit-image's pictures; none without scikit-image."""
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


def _write_clip(path: Path, real: Path, forged: Path) -> None:
    """The photo as a clip of five seconds, with its forged twin in the middle third."""
    import av
    import numpy as np
    from PIL import Image

    with Image.open(real) as photo, Image.open(forged) as twin, av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=12, width=photo.width, height=photo.height)
        stream.pix_fmt, stream.bit_rate = "yuv420p", 12_000_000
        for number in range(60):
            picture = twin if 20 <= number < 40 else photo
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
        container.mux(stream.encode(None))


def listed(models: Sequence[str] = (), **loading: Unpack[LoadOptions]) -> dict[str, Callable[[], Detector]]:
    """The loader of each model in the page's list, by its name there: the given models, then the embedded one.

    A list never mixes models of this machine with models of an endpoint, because the page says whether faces leave the
    machine. Raises SetupError for such a mixture.
    """
    specs = [ModelSpec.parse(model) for model in models]
    if len({spec.host for spec in specs if not spec.embedded}) > 1:
        raise SetupError("all models of a page must run here, or at one endpoint", code="models_apart")
    loaders: dict[str, Callable[[], Detector]] = {
        f"{spec.name} at {spec.host}" if spec.host else text: partial(x2dfd.load, spec, **loading)
        for text, spec in zip(models, specs, strict=True)
    }
    if "embedded" not in loaders:  # among others it is loaded without options
        loaders["embedded"] = x2dfd.load if models else partial(x2dfd.load, **loading)
    return loaders


def run(
    models: Sequence[str],
    host: str,
    port: int,
    *,
    loading: LoadOptions | None = None,
    root_path: str = "",
    names: Sequence[str] = (),
) -> None:
    """Load the first model of the list and serve the page until it is stopped; a visitor's choice loads the others.

    Arguments as for `listed` and `app.demo.launch`. Uploads are removed at the end.
    Raises X2DFDError for what a user can mend.
    """
    check_host(host)
    if find_spec("gradio") is None:
        raise SetupError("the demo needs gradio: pip install -c constraints.txt '.[app]'", code="package_missing")
    from app.demo import build, launch

    (name, load), *others = listed(models, **(loading or {})).items()
    if host not in LOOPBACK:
        print(f"note: everyone who can reach {host}:{port} can use this page; it asks for no password", file=sys.stderr)
    detector = load()
    with tempfile.TemporaryDirectory(prefix="x2dfd-") as folder, isolating(UPLOAD_SECONDS):
        # Uploads are deleted with this folder at the end, unless the environment names another one.
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(folder) / "uploads"))
        page = build(
            detector, make_examples(Path(folder)), name=name, others=dict(others),
            sends_to=next(filter(None, (ModelSpec.parse(model).host for model in models)), ""),
        )  # fmt: skip
        print(f"open http://{host}:{port} in a browser; Ctrl+C stops it", file=sys.stderr)
        try:
            launch(page, host, port, root_path=root_path, names=names)
        except OSError as error:
            raise SetupError(
                f"cannot listen on {host}:{port} ({error}); give another port with --port", code="port_unavailable"
            ) from error


EPILOG = """\b
Examples:
  python -m app --model build/adapter --port 8000
  python -m app --model x2dfd@http://localhost:8000/v1+DIR
"""


def command(
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help=f"{options.MODEL_HELP} Repeat it to let visitors choose."),
    ] = None,
    mode: options.ModeOption = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    bits: options.BitsOption = None,
    device_map: options.DeviceMap = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 7860,
    root_path: Annotated[str, typer.Option(metavar="/PATH", help="The path under which a proxy shows the page.")] = "",
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="A host name by which browsers reach the page, as behind a proxy; others are refused."
        ),
    ] = None,
) -> None:
    """Upload a photo or a short video, see the verdict and its reasons, ask about it."""
    # A service manager's stop must end the app as Ctrl+C does, so that uploads and examples are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    loading = options.load_options(mode, device, dtype, bits, device_map)
    try:
        run(model or [], host, port, loading=loading, root_path=root_path, names=name or ())
    except KeyboardInterrupt:  # after the page answers, but before Gradio waits for a stop
        typer.echo("stopped", err=True)


if __name__ == "__main__":
    wait_passively()
    run_command(command, EPILOG)

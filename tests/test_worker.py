"""A file or a plug-in that hangs, crashes or eats memory costs its own row, and the next one is judged."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import x2dfd
from tests import stub
from tests.pictures import encoded
from tests.raising import raises
from x2dfd import cli, experts, worker
from x2dfd.errors import InputError, SetupError, UnknownName, X2DFDError
from x2dfd.media import Picture, load_media
from x2dfd.types import Face
from x2dfd.worker import Worker, isolated, isolating

SECONDS = 1.0


@pytest.fixture(scope="module")
def small() -> Iterator[Worker]:
    bounded = Worker(SECONDS, 1 << 30, doing="decoding")
    yield bounded
    bounded.close()


@pytest.mark.parametrize(
    ("function", "given", "code"),
    [
        pytest.param(os._exit, (0,), "decoder_died", id="exit"),
        pytest.param(signal.raise_signal, (signal.SIGSEGV,), "decoder_died", id="native-crash"),
        pytest.param(os.abort, (), "decoder_died", id="native-abort"),
        pytest.param(time.sleep, (60,), "too_slow", id="sleeps"),
        pytest.param(exec, ("while True: pass",), "too_slow", id="spins"),
        pytest.param(bytearray, (4 << 30,), "out_of_memory", id="memory"),
        pytest.param(os.urandom, (-1,), "failed", id="unexpected"),
        pytest.param(exec, ("raise SystemExit(3)",), "failed", id="leaves"),
    ],
)
def test_what_ends_a_process_is_an_error_of_that_call_alone(
    small: Worker, function: Any, given: tuple[Any, ...], code: str
) -> None:
    """A native crash in a decoder ended the whole run, and nothing could stop one that hung."""
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        small.call(function, *given)
    assert caught.value.code == code and time.monotonic() - start < 60
    assert small.call(os.getpid) != os.getpid()


def test_errors_that_are_meant_arrive_as_they_are(small: Worker) -> None:
    """A missing package must stay a SetupError: as a row, it would be written for each of a thousand files."""
    for error, code in (
        (X2DFDError("a", code="settings_differ"), "settings_differ"),
        (SetupError("x2dfd fetch", code="weights_missing"), "weights_missing"),
        (InputError("corrupt", "a reason"), "corrupt"),
        (UnknownName("part", "bas", ["base"]), "unknown_name"),
    ):
        with pytest.raises(type(error)) as caught:
            small.call(exec, "raise error", {"error": error})
        assert (caught.value.code, caught.value.line, str(caught.value)) == (code, error.line, str(error))
        assert error.line.startswith(f"error [{code}]: ")


def test_an_interrupted_call_leaves_no_answer_for_the_next(small: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl+C in a session the next file would have got the report of the one before."""
    small.call(os.getpid)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(small._pipe), "recv_bytes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small.call(str, "old")
    assert small.call(str, "new") == "new"
    # The system's out-of-memory killer takes a process while nothing runs: the next file is not to blame.
    os.kill(small.call(os.getpid), signal.SIGKILL)
    assert small._process is not None
    small._process.wait()
    assert small.call(str, "here") == "here"


def tells(on_progress: Any = None) -> None:
    on_progress(1)


def test_what_a_caller_raises_is_not_the_end_of_the_process() -> None:
    """A full disk under a progress line was told as a decoder that had died, and the run went on."""

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    telling = Worker(None, None, clock=60.0, doing="telling", module=__name__)
    with pytest.raises(OSError, match="No space left"):
        telling.call(tells, on_progress=full)
    assert telling.call(str, "new") == "new"
    telling.close()


class Acts:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("answer", [Acts(), SimpleNamespace(), os.system, Path("/"), None])
def test_nothing_but_records_is_read_of_an_answer(answer: Any) -> None:
    """A decoder that a file has taken over could otherwise have its parent run anything, by a dotted name too."""
    dotted = b"\x80\x04\x8c\x0cx2dfd.worker\x8c\tio.TextIO\x93."
    with pytest.raises(pickle.UnpicklingError):
        worker._Records(io.BytesIO(pickle.dumps((False, answer)) if answer else dotted)).load()


@isolated
def decoder(source: str | Path | bytes) -> tuple[bytes, int]:
    """Stands in for one that dies of the bytes it is given."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if data == b"segv":
        signal.raise_signal(signal.SIGSEGV)
    return data, os.getpid()


def png(shade: int = 0, side: int = 40) -> bytes:
    return encoded(Image.new("RGB", (side, side), (shade, 90, 60)), "PNG")


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that starts quickly: these files are decoded and not judged."""
    monkeypatch.setattr(worker, "INTAKE", "x2dfd.media")


def test_a_file_is_decoded_elsewhere_only_while_isolating(tmp_path: Path, light: None) -> None:
    """Pixels that were decoded there are those decoded here, to write on as well."""
    path = tmp_path / "a.png"
    path.write_bytes(png())
    assert decoder(b"x")[1] == os.getpid()
    here = load_media(path)
    with isolating():
        there = load_media(path)
        other = decoder(path)[1]
        with raises("decoder_died", "SIGSEGV"):
            decoder(b"segv")
        assert os.getpid() != decoder(path)[1] != other
        assert load_media(Image.open(path)).format == "PIL"
    assert isinstance(here, Picture) and isinstance(there, Picture)
    assert np.array_equal(here.pixels, there.pixels) and here.file == there.file and here.sha256 == there.sha256
    there.pixels[0] = 0
    assert decoder(b"x")[1] == os.getpid()


def slow_gif() -> bytes:
    """About 20 seconds of decoding."""
    data = encoded(Image.new("L", (4000, 4000)), "GIF")
    at = data.index(b",\0\0\0\0")
    return data[:at] + data[at:-1] * 120 + b";"


@pytest.mark.parametrize(
    ("bad", "bounds", "code"),
    [
        pytest.param(slow_gif, (4.0, None), "too_slow", id="slow"),
        pytest.param(lambda: png(side=7000), (60.0, 150 << 20), "out_of_memory", id="large"),
    ],
)
def test_a_file_that_costs_too_much_is_ended(
    bad: Any, bounds: tuple[float, int | None], code: str, light: None
) -> None:
    """A picture within every limit of size can still take minutes, or more memory than a small machine has."""
    with isolating(*bounds):
        with pytest.raises(InputError) as caught:
            load_media(bad())
        assert caught.value.code == code
        assert isinstance(load_media(png()), Picture)


@pytest.mark.slow  # of the detector's imports, in two processes
def test_a_batch_goes_on_past_a_file_that_ends_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one row with a code, beside the other files' rows; the page of the run is made in spite of it."""
    paths = [tmp_path / name for name in ("a.png", "bad", "c.png")]
    for shade, path in enumerate(paths):
        path.write_bytes(slow_gif() if path.name == "bad" else png(shade))
    monkeypatch.setattr(x2dfd, "load", lambda *_, **__: stub.without_model())
    monkeypatch.setattr(worker, "isolating", lambda: isolating(8.0))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(
        cli.app, ["detect", "--isolate", "--json", "--report", str(page), *map(str, paths)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("error", {}).get("code") for row in rows] == [None, "too_slow", None]
    assert page.is_file() and worker._files is None


PLUGIN = """
import os, time
import numpy as np
from x2dfd.types import Card, Cue, Evidence

class Odd:
    card = Card("odd", "1", "a test", "none", "", "", "", "everything")

    def judge(self, faces, shared=None):
        print("on stdout, where the command's data stand")
        what = int(faces[0].crop[0, 0, 0])
        if what == 1:
            time.sleep(600)
        if what == 2:
            os.abort()
        if what == 3:
            raise ValueError("not this one")
        return [Evidence("odd", np.float32(0.25), "seen", (Cue("jaw", "blur"),)) for _ in faces]
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> experts.PlugIn:
    """An installed package that registers an expert."""
    (tmp_path / "odd_plugin.py").write_text(PLUGIN)
    info = tmp_path / "odd_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[x2dfd.experts]\nodd = odd_plugin:Odd\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = experts.load_expert("odd")
    assert isinstance(found, experts.PlugIn) and found.card.name == "odd"
    found._worker.clock = 60.0  # a busy machine imports torch slowly
    return found


def face(what: int) -> Face:
    crop, points = np.full((8, 8, 3), what, np.uint8), np.zeros((468, 2), np.float32)
    return Face(0, (0.0, 0.0, 8.0, 8.0), points, 0.9, crop, points, 0.0)


@pytest.mark.slow
def test_a_plug_in_that_hangs_or_dies_gives_no_score_and_the_reason(odd: experts.PlugIn) -> None:
    """A batch of a thousand photos stood still for one plug-in, and a crash in its native code ended the run; beside a
    language model, none answered: a model does not go by value, states do."""
    [good, same] = experts.ask(odd, [face(0), face(0)])
    assert good == same and good.score == 0.25 and good.cues and "odd_plugin" not in sys.modules
    states = experts.Shared((torch.zeros(1, 197, 768),), "")
    assert odd.judge([face(0)], states)[0].score == 0.25
    [failed, fine] = experts.ask(odd, [face(3), face(0)])
    assert failed.score is None and "not this one" in (failed.note or "") and fine.score == 0.25
    odd._worker.clock, start = 5.0, time.monotonic()
    [hung] = experts.ask(odd, [face(1)])
    assert hung.score is None and "5 seconds" in (hung.note or "") and time.monotonic() - start < 100
    odd._worker.clock = 60.0
    assert experts.ask(odd, [face(0)])[0].score == 0.25
    died = experts.ask(odd, [face(2), face(0)])
    assert [e.score for e in died] == [None, None] and "SIGABRT" in (died[0].note or "")
    start = time.monotonic()
    [left_out] = experts.ask(odd, [face(1)])
    assert left_out.score is None and left_out.note and time.monotonic() - start < 1

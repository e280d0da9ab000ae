"""Nothing that one file holds ends a run: whatever it makes a library raise, at whatever stage, is its own row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import x2dfd
from tests import stub
from tests.pictures import encoded
from tests.raising import raises
from x2dfd import cli
from x2dfd.detector import Detector
from x2dfd.errors import SetupError
from x2dfd.types import Failure, Report

STAGES = ["x2dfd.media.sniff", "x2dfd.faces._meshes", "x2dfd.intake.read_provenance"]
KINDS: dict[str, Callable[[], BaseException]] = {
    "IndexError": lambda: IndexError("list index out of range"),
    "RecursionError": RecursionError,
    "MemoryError": MemoryError,
    "SystemExit": lambda: SystemExit(3),
    "OSError": lambda: OSError(5, "Input/output error"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
}
CODES = {"RecursionError": "too_deep", "MemoryError": "out_of_memory"}


@pytest.fixture
def detector() -> Detector:
    return stub.without_model()


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("bad.png", "good.png")]
    for shade, path in enumerate(paths):
        Image.new("RGB", (40, 40), (shade, 90, 90)).save(path)
    return paths


@contextmanager
def failing_once(stage: str, kind: Callable[[], BaseException]) -> Iterator[pytest.MonkeyPatch]:
    """Within the block, the first call of the stage raises; the others do their work."""
    module, _, name = stage.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    calls: list[int] = []

    def first_fails(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise kind()
        return original(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, first_fails)
        yield patch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_whatever_a_file_makes_a_library_raise_is_its_row(
    stage: str, kind: str, detector: Detector, pictures: list[Path], tmp_path: Path
) -> None:
    """A small FLV raised IndexError inside PyAV: `detect` ended with a traceback and every resume stopped there."""
    code = CODES.get(kind, "failed")
    with failing_once(stage, KINDS[kind]), raises(code):
        detector.detect(pictures[0])
    with failing_once(stage, KINDS[kind]):
        bad, good = detector.detect_many(pictures)
        assert isinstance(bad, Failure) and bad.code == code and bad.reason and bad.sha256 and isinstance(good, Report)
    with failing_once(stage, KINDS[kind]) as patch:
        patch.setattr(x2dfd, "load", lambda *_, **__: detector)
        out = tmp_path / "rows.jsonl"
        done = CliRunner().invoke(cli.app, ["detect", *map(str, pictures), "--json", "--out", str(out)])
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row.get("error", {}).get("code") for row in rows] == [code, None]
        assert [json.loads(line)["error_code"] for line in out.read_text().splitlines()] == [code, None]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, lambda: SetupError("the trust list cannot be read")])
def test_an_interrupt_and_a_wrong_set_up_end_the_run(
    stage: str, kind: Callable[[], BaseException], detector: Detector, pictures: list[Path]
) -> None:
    """A user who stops a run, or whose set-up is wrong for every file, must not get a thousand rows of it."""
    with failing_once(stage, kind), pytest.raises((KeyboardInterrupt, SetupError)):
        list(detector.detect_many(pictures))


def test_a_clip_whose_frames_break_the_face_finder_is_a_row(detector: Detector) -> None:
    """Faces of a clip are found inside its decoder: their failure must not be told as one of decoding."""
    frames = [Image.new("RGB", (40, 40), (20 * i, 0, 0)) for i in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    missing = SetupError("the face models are missing")  # of no clip: it would make every video 'cannot be read'
    with failing_once("x2dfd.faces._meshes", lambda: missing), pytest.raises(SetupError):
        detector.detect(data)
    with failing_once("x2dfd.faces._meshes", KINDS["IndexError"]):
        [row] = detector.detect_many([data])
    assert isinstance(row, Failure) and row.code == "failed" and "finding faces" in row.reason

"""Progress of long work: seen in a log too, and never part of the data."""

from __future__ import annotations

import pytest

from x2dfd import progress as module
from x2dfd.progress import progress


def test_a_log_gets_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug prevented: an hour of silence in a log; progress on stdout, where the data goes; items lost on the way."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("x2dfd.progress.time.monotonic", lambda: next(clock))
    assert list(progress(range(8), "asking")) == list(range(8))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 2
    assert lines[0] == "asking: 2 of 8, 0.1/s, 0:01:30 left"


def test_what_has_no_length_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug prevented: a generator without a known length that raises, or promises an end."""
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    assert list(progress(iter("abc"), "reading")) == ["a", "b", "c"]
    assert "left" not in capsys.readouterr().err

"""The load script itself, on a few pictures: a process that is really killed, and the same result file."""

from __future__ import annotations

from pathlib import Path

import pytest

import x2dfd
from eval import load_bench


def test_a_killed_process_ends_in_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of many hours that starts anew, or whose result tells that it was cut off."""
    monkeypatch.setattr(x2dfd, "load", None, raising=False)  # put back after the stub has taken its place
    manifest = load_bench.write_pictures(tmp_path, 200)
    straight = load_bench.judge_all(manifest, tmp_path / "straight", None)
    killed, told = load_bench.child(manifest, tmp_path / "cut", dies_at=100)
    assert killed == -9 and told == {} and not (tmp_path / "cut" / "result.json").exists()
    kept = sum(len(p.read_text().splitlines()) - 1 for p in (tmp_path / "cut" / "parts").iterdir())
    resumed = load_bench.judge_all(manifest, tmp_path / "cut", None)
    # One is judged again, to see that the model is the same.
    assert 0 < kept <= 100 and (straight["judged"], resumed["judged"]) == (200, 200 - kept + 1)
    results = [(tmp_path / name / "result.json").read_bytes() for name in ("straight", "cut")]
    assert results[0] == results[1]

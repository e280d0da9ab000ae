"""The notebook runs as it stands, cell after cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from x2dfd.types import Report

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_steps.ipynb"


@pytest.mark.slow
@pytest.mark.needs_base
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug prevented: the first thing that a newcomer copies stops at a renamed function."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "the notebook is kept without what one run printed"
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    said = capsys.readouterr().out
    assert "real.jpg: Likely real" in said and "forged.jpg: Likely fake" in said
    assert isinstance(names["report"], Report) and Path("build/notebook/report.html").is_file()
    assert said.count("expert='sharpness'") == 2

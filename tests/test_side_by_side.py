"""Many models over the same pictures: one table, nobody's failure is another's, and nothing is judged twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray

import x2dfd
from eval import page, run_bench, side_by_side, tables
from eval.stand_in import Behind, StandIn
from tests import tiny
from x2dfd.experts import BUILTIN
from x2dfd.mllm import LocalMLLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny base, its adapter, and a manifest of eight pictures."""
    from tests.conftest import require_base

    require_base()
    folder = tmp_path_factory.mktemp("models")
    photo: NDArray[np.uint8] = np.array(skimage.data.astronaut(), dtype=np.uint8)
    base = tiny.write_base(folder / "base")
    return base, tiny.write_adapter(folder / "tiny", base), tiny.write_small_manifest(folder / "data", photo)


@pytest.fixture(autouse=True)
def own_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests' expert, no published weights, no proxy, no plots (tests/test_page.py looks at them)."""
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
    monkeypatch.setattr("external_detectors.published.cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(page, "_plots", lambda result: iter(()))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_one_table_of_many_models(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A night's run lost to one missing file; models judged on other pictures; a column under the wrong head."""
    pytest.importorskip("openai")
    base, adapter, manifest = folders
    behind = x2dfd.load(base=str(base), adapter=adapter).mllm
    assert isinstance(behind, LocalMLLM)
    judged: list[int] = []
    judge = run_bench.judged

    def counted(model: Any, samples: Any, **options: Any) -> Any:
        judged.append(len(samples))
        return judge(model, samples, **options)

    monkeypatch.setattr(run_bench, "judged", counted)
    answer = Behind(behind)
    with StandIn(answer, models=["tiny"], tokenize=answer.tokenize) as endpoint:
        chosen = [
            f"{adapter} --base {base}",
            f"expert:{tiny.EXPERT}",
            "expert:mesonet",
            "nobody --served http://127.0.0.1:9/v1",
            f"tiny --served {endpoint.url} --adapter {adapter}",
            "majority",
            "template",
        ]
        words = ["--data", str(manifest), "--out", str(tmp_path / "out"), "--bootstrap", "50"]
        words += [word for model in chosen for word in ("--model", model)]
        assert side_by_side.main(words) == 0
        said = capsys.readouterr()
        assert judged == [8, 8, 8, 8, 8]  # three models detect, two of them describe
        first = (tmp_path / "out" / "result.json").read_bytes()
        assert side_by_side.main(words) == 0
        assert judged[5:] == [1] * 5  # only to see that the models are the same
        assert (tmp_path / "out" / "result.json").read_bytes() == first
    result = json.loads(first)
    assert str(tmp_path) not in first.decode() and str(adapter.parent) not in first.decode()
    served = "tiny, served, adapter tiny"
    assert result["left_out"] == [
        {"task": "detect", "model": "expert:mesonet"},
        {"task": "detect", "model": "nobody, served"},
        {"task": "describe", "model": "nobody, served"},
    ]
    reasons = [line for line in said.err.splitlines() if line.startswith("left out: ")]
    assert len(reasons) == 3 and "put MesoInception_DF.h5" in reasons[0] and "127.0.0.1:9" in reasons[1]

    rows = {row["model"]: row for row in result["detect"]}
    alone = "tiny: MLLM alone"
    assert list(rows) == ["tiny", alone, f"expert:{tiny.EXPERT}", served, f"{served}: MLLM alone", "majority"]
    assert all(row["n"] == row["n_scored"] == 8 for row in rows.values())
    own = json.loads((tmp_path / "out" / "detect" / "tiny" / "result.json").read_text("utf-8"))["scorers"]
    for name, scorer in (("tiny", "calibrated"), (alone, "mllm")):
        for key in ("auc", "average_precision", "tpr_at_fpr_0.05", "ece_15"):
            assert rows[name][key] == own[scorer]["overall"][key]
    assert rows["tiny"]["false_alarms"] == own["calibrated"]["answers"]["false_alarms"]
    assert rows[served]["auc"]["value"] == rows["tiny"]["auc"]["value"]  # the same weights, elsewhere
    assert rows["tiny"]["against_first"] is None and rows["majority"]["auc"]["value"] == 0.5
    less = rows["majority"]["against_first"]
    assert less["difference"]["value"] == pytest.approx(0.5 - rows["tiny"]["auc"]["value"]) and less["n"] == 8
    assert rows[f"expert:{tiny.EXPERT}"]["answered"] is None and rows["majority"]["answered"] == 1.0

    texts = {row["model"]: row for row in result["describe"]}
    assert list(texts) == ["tiny", served, "majority", "template"]
    assert texts["majority"]["areas_f1"]["value"] > 0 and texts["template"]["text"]["n"] == 8
    assert texts["majority"]["text"] is None and texts["tiny"]["distinct_texts"] is not None

    table = tables.TABLES["models"]({"night": result})
    assert said.out.strip() == table.replace("`night`", "`result`")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows) + 2 + len(texts) and {len(line) for line in lines[:8]} == {9}
    tiny_line = dict(zip(lines[0], lines[2], strict=True))
    value, (low, high) = rows["tiny"]["ece_15"]["value"], rows["tiny"]["ece_15"]["interval"]
    assert tiny_line["ECE"] == f"{value:.3f} [{low:.3f}, {high:.3f}]" and tiny_line["n"] == "8 of 8"
    assert "Not here: expert:mesonet, nobody, served." in table
    assert tables.TABLES["models"]({}) == "No results yet."


def test_what_is_asked_is_checked_before_anything_runs(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found out after hours: two runs in one folder, an option that no model has, a comparison that is not made."""
    words = ["--data", str(folders[2]), "--out", str(tmp_path / "out")]
    assert side_by_side.main([*words, "--model", "majority", "--model", "majority"]) == 2
    assert "majority is named twice" in capsys.readouterr().err
    assert side_by_side.main([*words, "--model", "majority", "--model", "fusion --mode paper"]) == 2
    for wrong in (
        ["--model", "majority --sreved x"],
        ["--tasks", "detekt"],
        ["--compare", "ref.json"],
        ["--limit", "0"],
    ):
        with pytest.raises(SystemExit):
            side_by_side.main([*words, *wrong])
    assert side_by_side.main([*words, "--model", "expert:mesonet"]) == 2
    assert "no model could be run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_usual_models_are_all_there() -> None:
    """An expert that is registered and in no comparison."""
    assert {"embedded", "fusion", "majority", "template", "expert:mesonet"} <= set(side_by_side.ALL)
    wanted = side_by_side.entries(side_by_side.ALL, ["detect", "describe"], Path("out"), ["--data", "m.csv"])
    asked = {task: [e.label for e in wanted if e.task == task] for task in ("detect", "describe")}
    assert asked["detect"] == [model for model in side_by_side.ALL if model != "template"]
    assert asked["describe"] == ["embedded", "majority", "template"]
    assert len({e.args.out for e in wanted}) == len(wanted)

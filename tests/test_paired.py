"""Two runs side by side, on the same samples or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval import paired
from x2dfd.errors import X2DFDError


def run(scores: dict[str, float | None], label: Any = lambda name: "fake" if name < "m" else "real") -> dict[str, Any]:
    return {name: {"label": label(name), "group": f"g{name}", "score": s} for name, s in scores.items()}


def rows(seed: int, spread: float, n: int = 120) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    names = [f"{'a' if i % 2 else 'z'}{i:03}" for i in range(n)]
    return run({name: float((name < "m") + rng.normal(0, spread)) for name in names})


def test_a_better_model_is_found_and_an_equal_one_is_not() -> None:
    """Intervals of two AUCs overlap long before their difference is chance."""
    good, worse = rows(0, 0.7), rows(1, 2.0)
    found = paired.paired(good, worse, n=300)
    assert found["difference"]["value"] == pytest.approx(found["auc"][0] - found["auc"][1])
    assert found["difference"]["interval"][0] > 0 and found["delong"]["p"] < 0.01
    same = paired.paired(good, good, n=100)
    assert same["difference"] == {"value": 0.0, "interval": [0.0, 0.0]} and same["delong"]["p"] == 1.0


def test_only_what_both_scored_is_compared() -> None:
    """Leaving out the hard pictures would win the comparison."""
    first, second = rows(0, 1.0), rows(1, 1.0)
    del second["a001"]
    second["a003"]["score"] = None
    found = paired.paired(first, second, n=50)
    assert (found["n"], found["n_first_only"], found["n_unscored"]) == (118, 1, 1)


def test_other_labels_are_refused() -> None:
    """The label polarity of two manifests differs, and the comparison would be of nothing."""
    with pytest.raises(X2DFDError, match="by another label"):
        paired.paired(run({"a": 0.1, "z": 0.2}), run({"a": 0.1, "z": 0.2}, lambda _: "real"))
    with pytest.raises(X2DFDError, match="share no sample"):
        paired.paired(run({"a": 0.1}), run({"b": 0.1}))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt scorer must not end in a traceback, nor in another column."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        table = [{"id": i, **{k: row[k] for k in ("label", "group")}, "p_fake": row["score"]}
                 for i, row in rows(len(name), 1.0).items()]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(table), tmp_path / name / "samples.parquet")
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--bootstrap", "20"]
    assert paired.main(words) == 0
    assert json.loads(capsys.readouterr().out)["difference"]["value"] == 0.0
    assert paired.main([*words, "--scorer", "p_fak"]) == 2
    assert "did you mean 'p_fake'" in capsys.readouterr().err
    assert paired.main([str(tmp_path / "a"), str(tmp_path / "none")]) == 2

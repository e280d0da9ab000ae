"""False alarms as promised: a bound that holds, and one that is not promised where nothing can be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binom

from eval import risk
from eval.scoring import Resampling
from x2dfd.manifest import Sample


def test_the_bound_by_hand() -> None:
    """A threshold that 5 % of 100 photos reach is no promise of 5 %; the exact test allows one alarm in 100."""
    scores = np.arange(100) / 100
    groups = [f"g{i}" for i in range(100)]
    chosen = risk.bounded_threshold(scores, groups, allowed=0.05, delta=0.1)
    # P(at most 1 of 100 | 5 %) = 0.037 <= 0.1 and P(at most 2) = 0.118 > 0.1: one alarm is allowed.
    assert binom.cdf(1, 100, 0.05) < 0.1 < binom.cdf(2, 100, 0.05)
    assert chosen is not None and 0.98 < chosen < 0.98 + 1e-9  # any threshold above the second score will do
    assert risk.bounded_threshold(scores[:20], groups[:20], 0.05, 0.1) is None  # 0.95 ** 20 = 0.36: too few to say
    assert risk.bounded_threshold(np.array([]), [], 0.05, 0.1) is None


def test_copies_of_a_photo_promise_nothing_more() -> None:
    """Thirty frames of one clip counted as thirty photos make the bound too low."""
    scores, groups = np.arange(100) / 100, [f"g{i}" for i in range(100)]
    twice = risk.bounded_threshold(np.tile(scores, 5), groups * 5, 0.05, 0.1)
    assert twice == risk.bounded_threshold(scores, groups, 0.05, 0.1)


def test_the_bound_holds_as_often_as_promised() -> None:
    """The share of draws in which the true false alarm rate exceeds the allowed one has to stay below delta."""
    rng = np.random.default_rng(0)
    names = [f"g{i}" for i in range(150)]
    broken = []
    for _ in range(400):
        t = risk.bounded_threshold(rng.random(150), names, 0.1, 0.1)
        assert t is not None
        broken.append(1 - t > 0.1)  # scores are uniform: the true rate at t is 1 - t
    assert 0.0 < np.mean(broken) < 0.13


def test_ties_are_all_above_or_all_below() -> None:
    """A threshold in the middle of equal scores does not exist."""
    scores = np.array([0.9] * 10 + [0.1] * 90)
    chosen = risk.bounded_threshold(scores, [str(i) for i in range(100)], 0.05, 0.1)
    assert chosen is not None and chosen > 0.9


def test_agrees_with_mapie() -> None:
    """A test of our own under the name of a bound: both have to allow the same number of alarms."""
    pytest.importorskip("mapie", reason="MAPIE is not installed (pip install -e '.[bench]')")
    rng = np.random.default_rng(1)
    for n in (100, 300):
        scores, groups = rng.random(n), [str(i) for i in range(n)]
        ours = risk.bounded_threshold(scores, groups, 0.1, 0.1)
        theirs = risk.mapie_threshold(scores, groups, 0.1, 0.1, np.sort(scores))
        assert ours is not None and theirs is not None
        assert (scores >= ours).sum() == (scores >= theirs).sum() > 0


def test_a_promise_is_measured_on_reals_that_were_assessed() -> None:
    """Rates over all pictures, or unreadable files as kept promises, would look better."""
    samples = [Sample(f"r{i}", Path("/x"), "real", source="a" if i % 2 else "b", group=f"r{i}") for i in range(40)]
    samples += [Sample("f", Path("/x"), "fake", group="f")]
    said: list[str | None] = ["fake" if i < 20 else "real" for i in range(39)]
    rows = [{"said": s} for s in (*said, None, "fake")]
    found = risk.promise(samples, rows, {"false_alarms_allowed": 0.05, "split": "calib"}, Resampling(200, 0))
    assert found["measured"]["n"] == 39 and found["measured"]["value"] == pytest.approx(20 / 39)
    assert found["measured"]["kept"] is False and set(found["by_source"]) == {"a", "b"} and not found["seen"]
    fine = risk.promise(samples, [{"said": "real"}] * 41, {"false_alarms_allowed": 0.05}, Resampling(200, 0))
    assert fine["measured"]["kept"] is True


def test_the_command_counts_on_the_other_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted on the half that it was chosen on, every promise is kept."""
    rng = np.random.default_rng(2)
    table = []
    for i in range(400):
        fake = i % 2 == 1
        p = float(np.clip(rng.normal(0.7 if fake else 0.3, 0.15), 0, 1))
        table.append({"label": "fake" if fake else "real", "group": f"g{i}", "source": "cam", "p_fake": p})
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "samples.parquet")
    assert risk.main([str(tmp_path), "--halves", "40", "--allowed", "0.1"]) == 0
    ways = json.loads(capsys.readouterr().out)["ways"]
    plain, bound = ways["quantile per source (choose_band)"], ways["bounded (exact binomial)"]
    assert plain["halves"] == bound["halves"] == 40
    assert bound["threshold"] > plain["threshold"] and bound["broken"] < plain["broken"]
    assert 0.05 < plain["false_alarms"] < 0.15
    assert risk.main([str(tmp_path / "none")]) == 2 and risk.main([str(tmp_path), "--delta", "2"]) == 2

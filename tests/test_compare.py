"""Two runs side by side, on the same samples or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from eval.compare import ScoredSample, paired
from tests.raising import raises


def run(seed: int, spread: float) -> dict[str, ScoredSample]:
    rng = np.random.default_rng(seed)
    labels = {f"{i:03}": "fake" if i % 2 else "real" for i in range(120)}
    return {n: ScoredSample(own, f"g{n}", float((own == "fake") + rng.normal(0, spread))) for n, own in labels.items()}


def test_a_better_model_is_found_and_an_equal_one_is_not() -> None:
    """Intervals of two AUCs overlap long before their difference is chance."""
    found = paired(run(0, 0.7), run(1, 2.0))
    assert found.auc[0] is not None and found.auc[1] is not None and found.difference.interval is not None
    assert found.difference.value == pytest.approx(found.auc[0] - found.auc[1]) and found.difference.interval[0] > 0
    same = paired(run(0, 0.7), run(0, 0.7))
    assert same.difference.value == 0.0 and same.difference.interval is None


def test_only_what_both_scored_is_compared() -> None:
    """Leaving out the hard pictures would win the comparison; the label polarity of two manifests differs, and the
    comparison would be of nothing."""
    first, second = run(0, 1.0), run(1, 1.0)
    del second["001"]
    second["003"] = ScoredSample("fake", "g003", None)
    found = paired(first, second)
    assert (found.n, found.n_first_only, found.n_second_only, found.n_unscored) == (118, 1, 0, 1)
    with raises("samples_differ", 1):
        paired({"a": ScoredSample("fake", "g", 0.1)}, {"a": ScoredSample("real", "g", 0.1)})
    with raises("no_shared_sample"):
        paired({"a": ScoredSample("fake", "g", 0.1)}, {"b": ScoredSample("fake", "g", 0.1)})

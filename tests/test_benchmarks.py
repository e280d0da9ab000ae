"""The benchmarks: taking turns, ratios of one round, equal answers, bounds from shapes; on a clock that tests read."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import quality, speed
from benchmarks.roofline import Operations, Rates
from benchmarks.speed import Bench, Case
from data_gen.demo import make_pair
from eval import tables
from tests.raising import raises
from x2dfd.errors import X2DFDError
from x2dfd.tower_pass import _linear

RATES = Rates(flop_per_s=1e6, bytes_per_s=1e6)


@dataclass
class Clock:
    """Moves only when something is done."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, answers: Any = None) -> Callable[[], Any]:
        def call() -> Any:
            self.now += seconds
            return answers

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_cases_take_turns(clock: Clock) -> None:
    """All of A and then all of B times the machine's mood."""
    called: list[str] = []

    def case(name: str) -> Callable[[], None]:
        def call() -> None:
            called.append(name)
            clock.now += len(called)

        return call

    seconds = speed.timed({"a": case("a"), "b": case("b")}, 3)
    assert called == ["a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    # Eight faces at once in the time of three must not read as slower than one.
    found = speed.compare("x", {"1": Case(clock.takes(1.0)), "8": Case(clock.takes(3.0), per=8)}, Bench(5, RATES))
    assert found["ways"]["8"]["seconds"]["median"] == pytest.approx(3 / 8)
    assert found["ways"]["8"]["times_first"]["median"] == pytest.approx(0.38, abs=0.01)
    assert "times_first" not in found["ways"]["1"]


def test_a_way_with_other_answers_ends_the_run(clock: Clock) -> None:
    """A quick wrong answer would win every comparison."""

    def cases(other: Any) -> speed.Cases:
        first = {"p": np.array([0.5, 0.25]), "text": "The jaw."}
        return {"a": Case(clock.takes(1.0, first)), "b": Case(clock.takes(1.0, other))}

    same = {"p": np.array([0.5, 0.25 - 5e-5]), "text": "The jaw."}
    found = speed.compare("x", cases(same), Bench(1, RATES))
    assert found["ways"]["b"]["largest_difference"] == pytest.approx(5e-5)
    wrong: list[Any] = [
        same | {"p": np.array([0.5, 0.26])}, same | {"text": "The eyes."}, {"p": same["p"]},
        same | {"p": np.array([0.5, np.nan])},
    ]  # fmt: skip
    for other in wrong:
        with raises("results_differ", "x: b"):
            speed.compare("x", cases(other), Bench(1, RATES))
    # In 16 bits two words may be as likely: another text is named, numbers that differ still end the run.
    found = speed.compare("x", cases({"p": np.array([0.52, 0.25]), "text": "The eyes."}), Bench(1, RATES, "bf16"))
    assert found["ways"]["b"]["other_texts"] == ["text"]
    with raises("results_differ", "x: b"):
        speed.compare("x", cases({"p": np.array([0.6, 0.25]), "text": "The eyes."}), Bench(1, RATES, "bf16"))


def test_the_bound_follows_from_shapes_and_rates(clock: Clock) -> None:
    """Products that the count passes over, or a wrong factor, would make any share of the bound look good."""
    linear, x = torch.nn.Linear(64, 128), torch.randn(2, 5, 64)
    query = torch.randn(1, 2, 7, 16)
    for grad in (torch.inference_mode, torch.enable_grad):
        with grad(), Operations() as operations:
            linear(x)
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert operations.flop == 2 * 10 * 64 * 128 + 2 * 2 * 2 * 7 * 7 * 16
    ours = _linear(torch.ones(3, 4), torch.ones(3), torch.float32, "none")  # by oneDNN, not by MKL
    with Operations() as operations, torch.inference_mode():
        ours(torch.ones(1, 5, 4))
    assert operations.flop == 2 * 5 * 4 * 3
    # The layer is bound by its FLOPs at these rates, and by its bytes where products cost nothing.
    with torch.inference_mode(), Operations() as operations:
        linear(x)
    assert operations.bound(RATES) == pytest.approx(0.16384)
    size = 4 * (10 * 64 + 64 * 128 + 128 + 10 * 128)
    assert operations.bound(Rates(1e12, 1e6)) == pytest.approx(size / 1e6, rel=0.02)

    def call() -> None:
        clock.now += 0.5
        with torch.inference_mode():
            linear(x)

    case = Case(call, part=lambda: linear(x), parts=3, reads=1000)
    [way] = speed.compare("x", {"a": case}, Bench(1, RATES))["ways"].values()
    assert way["bound_seconds"] == pytest.approx(3 * 0.16384 + 0.001, abs=1e-5)
    assert way["share_of_bound"] == pytest.approx((3 * 0.16384 + 0.001) / 0.5, abs=1e-3)


@pytest.mark.slow
def test_every_comparison_of_a_model_runs_on_a_toy(tmp_path: Path) -> None:
    """The script has to work the first time that there is a GPU; and the page has to show what it wrote."""
    out = tmp_path / "speed.json"
    speed.run(out, geometry="toy", only="cpu", rounds=1, questions=4, threads=1)
    result = json.loads(out.read_text())
    [device] = result["devices"]
    ways = {c["name"]: list(c["ways"]) for c in device["comparisons"]}
    assert list(ways) == ["4 cue questions", "verdict, a face", "verdict, rationale, 4 cue questions, a chat turn",
                          "a training step, a picture"]  # fmt: skip
    for comparison in device["comparisons"]:
        for way in comparison["ways"].values():
            assert way["gflop"] > 0 and way["bound_seconds"] > 0 and way["seconds"]["median"] > 0
    page = tables.table("speed", {"s": result})
    assert "python -m benchmarks.speed --rounds 1 --questions 4 --geometry toy --threads 1 --out FILE" in page
    assert "between the 1 rounds of its row" in page and "--no-rationale" not in page  # a toy has no command
    device["comparisons"].append(device["comparisons"][0] | {"name": "the command, from its start"})
    assert "`x2dfd detect FILE --json --no-rationale` with one photo" in tables.table("speed", {"s": result})
    assert "4 cue questions" in page and "one by one, stock forward pass" in page and "% |" in page
    # The summary says what a warm call takes, and a toy has none.
    assert tables.table("summary", {"speed": result}) == tables.NOT_MEASURED


def test_the_summary_says_what_was_measured_on_what() -> None:
    """Bug prevented: seconds of a card or of other threads that stand in README as those of two cores."""
    ways = {"verdict": {"seconds": {"median": 0.12, "p10": 0.11, "p90": 0.13}}}
    comparisons = [{"name": "a batch", "ways": {}}, {"name": "warm, one face", "rounds": 3, "ways": ways}]
    devices = [{"device": name, "comparisons": comparisons} for name in ("cpu fp32", "cuda bf16")]
    page = tables.table("summary", {"speed": {"threads": 4, "devices": devices}})
    assert page.count("| 0.12 [0.11–0.13] | 3 rounds |") == 2 and "cpu fp32, 4 threads" in page and "cuda bf16" in page
    figure = {"value": 0.5, "interval": None, "n": 8, "groups": 3, "note": ""}
    answers = dict.fromkeys(("coverage", "accuracy", "false_alarms", "misses"), figure)
    scorer = {"answers": answers, "overall": {"auc": figure, "n_fake": 5, "n_real": 3}}
    page = tables.table("summary", {"detect": {"scorers": {"calibrated": scorer}}})
    assert "| 5 fakes, 3 photos |" in page and page.count("| 50.0 % | 4 of 8 |") == 4
    assert "called fake |" in page and "likely real" not in page  # the parts do not tell
    rotation = {"summary": {"generator": {"mean_auc": 0.8, "worst_auc": 0.55, "n": 7}}}
    assert "mean, worst | 0.80, 0.55 | 7 |" in tables.table("summary", {"rotation": rotation})


def test_ways_take_turns_and_a_probe_meets_no_source_twice() -> None:
    """Bug prevented: a peer whose AUC comes from pictures of the sources that it was fitted on, or out of order."""
    faces: Any = list(range(20))
    asked: list[str] = []

    def way(name: str) -> Callable[[Any], Any]:
        def score(part: Any) -> Any:
            asked.append(name)
            return np.array(part, float)

        return score

    given, seconds = quality.in_turns({"a": way("a"), "b": way("b")}, faces)
    assert given["a"].tolist() == given["b"].tolist() == faces and set(seconds) == {"a", "b"}
    assert asked == ["a", "b", "a", "b", "b", "a", "a", "b"]
    # The first feature tells the label within a source, and the contrary in the next one: no source helps another.
    sources = np.repeat(["s", "t"], 40)
    fake = np.tile([True, False], 40)
    features = np.where(fake == (sources == "s"), 1.0, -1.0)[:, None]
    chances = quality.probe(features, fake, list(sources))
    assert chances[fake].mean() < chances[~fake].mean()
    with pytest.raises(X2DFDError):
        quality.probe(features, fake, ["s"] * 80)


def test_the_picture_is_drawn_from_a_result_file(tmp_path: Path) -> None:
    """Bug prevented: a plot of other numbers than the table's, or one that takes the whole measurement to draw."""
    auc = {"value": 0.9, "interval": [0.85, 0.93], "n": 80, "groups": 70, "note": ""}
    ways = [{"name": n, "seconds": s, "megabytes": 344, "auc": auc} for n, s in (("a", 0.1), ("b", 1.0))]
    moved = {"auc": auc | {"value": 0.001, "interval": [-0.001, 0.002]}, "p_median": 0.002, "p_90": 0.009}
    result: Any = {"task": {"name": "quality"}, "data": {"sha256": "ab" * 32, "n_fake": 60, "n_real": 20}, "threads": 2}
    result |= {"ways": ways, "bf16_against_fp32": moved}
    (tmp_path / "quality.json").write_text(json.dumps(result))
    quality.run(out=tmp_path / "quality.json")
    assert (tmp_path / "quality.png").stat().st_size > 5000
    page = tables.table("quality", {"quality": result})
    assert "| a | 0.100 | 344 | 0.900 [0.850, 0.930] |" in page and "0.0020" in page
    with raises("not_a_result", "--data"):
        quality.run(out=tmp_path / "none.json")


@pytest.mark.slow
@pytest.mark.needs_base
def test_every_way_scores_real_pictures(tmp_path: Path) -> None:
    """Bug prevented: a benchmark that was never run, or one whose fast way says something else."""
    real, fake = make_pair(tmp_path)
    rows = [{"path": p.name, "label": n, "source": s, "group": f"{n}{s}{k}"}
            for n, p in (("real", real), ("fake", fake)) for s in "st" for k in range(2)]  # fmt: skip
    for k, row in enumerate(rows):  # a path stands in a manifest once
        shutil.copy(tmp_path / row["path"], tmp_path / f"{k}.png")
        row["path"] = f"{k}.png"
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quality.run(tmp_path / "m.jsonl", tmp_path / "quality.json", limit=8, threads=1)
    result = json.loads((tmp_path / "quality.json").read_text())
    assert [way["name"] for way in result["ways"]] == [quality.FP32, quality.BF16, quality.PROBE, quality.RECIPE]
    assert result["ways"][0]["auc"]["value"] == result["ways"][1]["auc"]["value"] == 1.0
    assert 0 < result["bf16_against_fp32"]["p_median"] < 0.02

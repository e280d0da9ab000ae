"""The timing: taking turns, per face, and packed questions against single ones, with a clock that a test can read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eval import speed, tables


@dataclass
class Clock:
    """Moves only when something is done."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_cases_take_turns_and_the_first_round_does_not_count(clock: Clock) -> None:
    """All of A and then all of B times the machine's mood; a first call pays for what is built once."""
    called: list[str] = []

    def case(name: str) -> Any:
        def call() -> None:
            clock.now += 100.0 if name not in called else len(called)
            called.append(name)

        return call

    seconds = speed.timed({"a": case("a"), "b": case("b")}, 3)
    assert called == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [2.0, 5.0, 6.0], "b": [3.0, 4.0, 7.0]}


def test_an_expert_is_timed_a_face(clock: Clock) -> None:
    """Eight faces at once in the time of three must not read as slower than one."""

    class Expert:
        card = SimpleNamespace(name="e")

        def judge(self, faces: Sequence[Any]) -> None:
            clock.now += 0.001 * (1 + (len(faces) - 1) * 2 / 7)

    found = speed.time_experts([Expert()], None, 5)  # type: ignore[list-item, arg-type]
    assert found["e"]["1"]["median"] == pytest.approx(1.0)
    assert found["e"]["8"]["median"] == pytest.approx(3 / 8, abs=0.01)


class Answerer:
    """Takes 1 s a look and .1 s a question; its own pass for a question costs both. Plain answers differ by .25."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def look(self, crops: NDArray[np.uint8]) -> str:
        self.clock.now += 1.0
        return "look"

    def yes_no_packed(self, look: str, questions: Sequence[str]) -> Any:
        self.clock.now += 0.1
        return SimpleNamespace(p_yes=np.array([len(q) / 10 for q in questions]))

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str]) -> Any:
        return self.yes_no_packed(self.look(crop[None]), questions)

    def yes_no_plain(self, crop: NDArray[np.uint8], questions: Sequence[str]) -> Any:
        self.clock.now += 1.1 * len(questions)
        return SimpleNamespace(p_yes=np.array([len(q) / 10 - 0.25 * (q == "ccc") for q in questions]))


def test_packed_questions_against_single_ones(clock: Clock) -> None:
    """A ratio without the look in it, or a difference whose sign cancels, would flatter the packing."""
    crop = np.zeros((4, 4, 3), np.uint8)
    found = speed.time_packing(Answerer(clock), crop, ["a", "bb", "ccc", "dddd"], 2)
    assert found["seconds"]["packed"]["median"] == pytest.approx(1.1)
    assert found["times_packed"]["one by one, shared prefix"]["median"] == pytest.approx(1.4 / 1.1, abs=0.01)
    assert found["times_packed"]["one by one, stock forward pass"]["median"] == pytest.approx(4.0, abs=0.01)
    assert found["largest_difference"] == {
        "one by one, shared prefix": 0.0,
        "one by one, stock forward pass": pytest.approx(0.25),
    }


def test_the_table_shows_what_was_timed_and_older_results_stay_readable(clock: Clock) -> None:
    """A result of before must not break the pages; a new one must not lose its columns."""
    base = {
        "task": {"name": "speed", "version": 1}, "threads": 2, "rounds": 3, "machine": {"cpu": "x"},
        "seconds": {"verdict": {"median": 0.5, "p10": 0.4, "p90": 0.6}},
    }  # fmt: skip
    older = tables.speed({"s": base}, all_cases=True)
    assert "| verdict | 0.50 | 0.40–0.60 |" in older and "ms a face" not in older
    packing = speed.time_packing(Answerer(clock), np.zeros((4, 4, 3), np.uint8), ["ccc"], 1)
    experts = {"clip": {n: {"median": 9.04, "p10": 8.0, "p90": 10.0} for n in ("1", "8")}}
    newer = tables.speed({"s": base | {"expert_ms_a_face": experts, "packing": packing}}, all_cases=True)
    assert newer.startswith(older) and "| clip | 9.0 [8.0–10.0] | 9.0 [8.0–10.0] |" in newer
    assert "| one by one, stock forward pass | 1.10 [1.10–1.10] | 1.0 [1.0–1.0] | 2.5e-01 |" in newer

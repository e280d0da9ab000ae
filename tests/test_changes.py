"""Suites of changes: what they say they do, from mild to strong, the same each time, and never another name for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.changes import CHANGES, CODEC, Change, changes_of
from tests.raising import raises
from x2dfd.degrade import codec

Pixels = NDArray[np.uint8]
EVERY = changes_of("codec")
ALL = CHANGES | EVERY
SIZES = {"half": 0.5, "quarter": 0.25, "screenshot": 0.8}


def _off(change: Change, pixels: Pixels) -> float:
    """Mean change; of one that shrinks, the share of pixels that are gone."""
    made = change(pixels, "a")
    if made.shape != pixels.shape:
        return 1000 * (1 - made.size / pixels.size)
    return float(np.abs(made.astype(int) - pixels).mean())


@pytest.fixture
def head(astronaut: Pixels) -> Pixels:
    """[281, 301, 3]: odd sides, more than 256."""
    return np.ascontiguousarray(astronaut[20:301, 90:391])


@pytest.mark.parametrize("name", ALL)
def test_a_change_gives_a_picture_and_the_same_one_again(name: str, head: Pixels) -> None:
    """Bug prevented: noise of a hidden generator, floats that wrap, a change that writes into its input."""
    before, change = head.copy(), ALL[name]
    one, two = change(head, "a"), change(head, "a")
    assert one.dtype == np.uint8 and one.ndim == 3 and np.array_equal(one, two) and np.array_equal(head, before)
    if one.shape == head.shape:
        assert (one != head).any() and np.abs(one.astype(int) - head).mean() < (12 if name in CHANGES else 120)
    if name in CHANGES:
        assert np.allclose(np.divide(one.shape[:2], head.shape[:2]), SIZES.get(name, 1.0), atol=0.01)
        assert np.array_equal(one, change(head, "b")) == (name != "noise")


@pytest.mark.parametrize(
    "levels", [*(k for k in CODEC.values() if len(k) > 1), [CHANGES[f"jpeg{q}"] for q in (95, 75, 50, 30)]]
)
def test_levels_run_from_mild_to_strong(levels: Sequence[Change], head: Pixels) -> None:
    """Bug prevented: level 5 milder than level 1, so that a curve of robustness reads backwards; quality and
    compression swapped, or a codec that ignores its parameter."""
    offs = [_off(change, head) for change in levels]
    assert offs == sorted(offs) and offs[-1] > 1.1 * offs[0]


def test_what_is_called_a_codec_is_one(head: Pixels) -> None:
    """Bug prevented: robustness to JPEG claimed from a picture that no codec has seen."""
    for name, change in EVERY.items():
        coded = any(word in change.line for word in ("JPEG", "WebP", "H.264"))
        assert coded == any(w in name for w in ("jpeg/", "webp/", "h264/", "share/"))
    assert np.array_equal(EVERY["codec/jpeg/40"](head, "a"), codec(head, ".jpg", 40))


def test_names_are_suites_kinds_or_changes() -> None:
    """Bug prevented: a misspelt suite that is silently no change at all."""
    assert list(changes_of("jpeg50,codec/share")) == ["jpeg50", "codec/share/once", "codec/share/recompressed"]
    assert len(EVERY) == sum(map(len, CODEC.values())) == 29 and len(changes_of("codec/blur")) == 5
    assert changes_of("none") == {} and changes_of("screenshot") == {"screenshot": CHANGES["screenshot"]}
    with raises("unknown_name", "did you mean 'codec/blur'"):
        changes_of("codek/blur")

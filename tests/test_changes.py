"""Suites of changes: what they say they do, from mild to strong, the same each time, and never another name for it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.changes import CHANGES, DEEPERFORENSICS, SUITES, Change, changes_of
from tests.raising import raises
from x2dfd.degrade import codec

Pixels = NDArray[np.uint8]
EVERY = {name: change for suite in SUITES for name, change in changes_of(suite).items()}
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


@pytest.mark.parametrize(("suite", "kind"), [(s, k) for s in SUITES for k in SUITES[s] if len(SUITES[s][k]) > 1])
def test_levels_run_from_mild_to_strong(suite: str, kind: str, head: Pixels) -> None:
    """Bug prevented: level 5 milder than level 1, so that a curve of robustness reads backwards."""
    offs = [_off(change, head) for change in SUITES[suite][kind]]
    assert offs == sorted(offs) and offs[-1] > 1.1 * offs[0]


def test_lower_quality_is_farther_from_the_picture(astronaut: Pixels) -> None:
    """Quality and compression swapped, or a codec that ignores its parameter."""
    errors = [_off(CHANGES[f"jpeg{q}"], astronaut) for q in (95, 75, 50, 30)]
    assert errors == sorted(errors) and errors[0] * 2 < errors[-1]


def test_the_published_parameters_do_what_is_published(head: Pixels) -> None:
    """Bug prevented: contrast about the mean, blocks on small faces, chroma scaled about another grey; deepFakeFace's
    numbers compared with pictures that were clipped where its own were not."""
    levels = DEEPERFORENSICS
    assert np.array_equal(levels["CC"][2](head, "a"), (head * np.float32(0.6)).astype(np.uint8))
    assert np.array_equal(levels["BW"][0](head[:255], "a"), head[:255])
    blocked = levels["BW"][0](head, "a")
    grey = (blocked != head).any(2)
    assert (blocked[grey] == 128).all() and 8 * 64 < grey.sum() <= 16 * 64
    colourless = levels["CS"][4](head, "a").astype(int)
    assert np.ptp(colourless, axis=2).max() <= 2  # chroma x 0: grey
    assert abs(colourless.mean() - (head @ [0.299, 0.587, 0.114]).mean()) < 2
    noise = levels["GNC"][2](np.full((300, 300, 3), 128, np.uint8), "a").astype(float)
    assert (noise @ [0.299, 0.587, 0.114]).std() == pytest.approx(255 * 0.005**0.5, rel=0.1)
    for ours, theirs in (("CC", "CC"), ("GB", "GB"), ("pixelate", "JPEG_pixelate")):
        assert np.array_equal(SUITES["dff"][ours][0](head, "a"), DEEPERFORENSICS[theirs][0](head, "a"))
    wrapped, cut = SUITES["dff"]["CS"][0](head, "a").astype(int), DEEPERFORENSICS["CS"][0](head, "a").astype(int)
    assert set(np.unique(np.abs(wrapped - cut))) <= {0, 255, 256, 254}


def test_names_are_suites_kinds_or_changes_and_say_what_they_hold(head: Pixels) -> None:
    """Bug prevented: a misspelt suite that is silently no change at all; robustness to JPEG claimed from a picture that
    no codec has seen."""
    assert list(changes_of("jpeg50,dff")) == ["jpeg50", "dff/CS", "dff/CC", "dff/GB", "dff/pixelate"]
    assert len(changes_of("deeperforensics")) == 35 and len(changes_of("deeperforensics/GB")) == 5
    assert changes_of("none") == {} and changes_of("screenshot") == {"screenshot": CHANGES["screenshot"]}
    assert len(EVERY) == sum(len(changes_of(s)) for s in SUITES)  # no name twice
    with raises("unknown_name", "did you mean 'deeperforensics/GB'"):
        changes_of("deeperforensic/GB")
    for name, change in EVERY.items():
        coded = "pixelate" not in name and any(word in change.line for word in ("JPEG", "WebP", "H.264"))
        assert coded == any(w in name for w in ("jpeg/", "webp/", "h264/", "share/", "/VC/"))
    flat = np.repeat(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 64, 0), 3, 2)
    assert len(np.unique(EVERY["deeperforensics/JPEG_pixelate/1"](flat, "a")[:, :, 0].std(0))) == 1  # no 8 x 8 grid
    assert np.array_equal(EVERY["codec/jpeg/40"](head, "a"), codec(head, ".jpg", 40))

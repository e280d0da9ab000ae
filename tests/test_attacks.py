"""Noise made against an expert and text painted into the picture: that it is an attack, and counted right."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from eval import tables
from eval.adversarial import attackable, faces_of, pgd, transfer
from eval.overlays import OVERLAYS, flips
from external_detectors.weights_io import to_unit
from tests.tiny import Brightness
from x2dfd.crops import CropSet
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.faces import PREPROCESSING
from x2dfd.manifest import Sample
from x2dfd.types import Card, Evidence, Face, FaceReport, Report, Verdict

Pixels = NDArray[np.uint8]


class TinyNet(nn.Module):
    """Pixels [n, 3, s, s] in -1..1 to one logit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)[:, 0]
        return logits * 20


class TinyExpert:
    card: ClassVar[Card] = Card("tiny", "1", "a test", "Apache-2.0", "", PREPROCESSING, "none", "all but itself")

    def __init__(self) -> None:
        self.net = TinyNet()

    def judge(self, faces: Any, shared: Any = None) -> list[Evidence]:
        crops = torch.from_numpy(np.stack([f.crop for f in faces]))
        with torch.inference_mode():
            return [Evidence("tiny", float(p)) for p in self.net(to_unit(crops)).sigmoid()]


def face(crop: Pixels) -> Face:
    size = float(crop.shape[0])
    points = np.zeros((468, 2), np.float32)
    return Face(0, (0.0, 0.0, size, size), points, 1.0, crop, points, 0.0)


@pytest.fixture
def crops() -> Pixels:
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(120, 40, (8, 32, 32, 3)), 0, 255).astype(np.uint8)


def test_noise_stays_within_its_bound_and_points_the_wrong_way(crops: Pixels) -> None:
    """Bug prevented: a bound of 8 of 255 read as 8 of 2; reals pushed towards real; a drift that rounding undoes."""
    net, fake = TinyNet(), np.arange(8) % 2 == 0

    def logits(x: Pixels) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(net(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1), np.float32)

    gained = []
    for epsilon in (2, 4, 8):
        changed = pgd(net, crops, fake, epsilon)
        assert changed.dtype == np.uint8 and np.abs(changed.astype(int) - crops).max() <= epsilon
        wrong = np.where(fake, logits(crops) - logits(changed), logits(changed) - logits(crops))
        noise = np.random.default_rng(1).integers(-epsilon, epsilon + 1, crops.shape)
        shaken = logits(np.clip(crops + noise, 0, 255).astype(np.uint8))
        assert (wrong > 0).all() and wrong.mean() > 3 * np.abs(shaken - logits(crops)).mean()
        gained.append(float(wrong.mean()))
        assert np.array_equal(changed, pgd(net, crops, fake, epsilon))
    assert gained == sorted(gained)
    assert np.array_equal(pgd(net, crops, fake, 0), crops)


def test_transfer_is_told_apart_from_the_attacked_expert(crops: Pixels) -> None:
    """Bug prevented: the attacked expert's fall reported as everybody's, or its clean score as the attacked one."""
    expert, bright = TinyExpert(), Brightness()
    faces = [face(c) for c in crops]
    scores = np.array([e.score for e in expert.judge(faces)])
    fake = scores > np.median(scores)  # right on all of them by construction
    found = transfer("tiny", expert.net, [expert, bright], faces, fake, steps=8)
    assert found["clean"]["tiny"]["auc"] == 1.0 and found["clean"]["tiny"]["moved"] == 0.0
    assert (found["n_real"], found["n_fake"], list(found["epsilon"])) == (4, 4, ["2", "4", "8"])
    for part in found["epsilon"].values():
        assert part["tiny"]["moved"] > 4 * abs(part["brightness"]["moved"])
    assert found["epsilon"]["8"]["tiny"]["auc"] < found["clean"]["tiny"]["auc"]
    assert found["epsilon"]["8"]["tiny"]["moved"] > found["epsilon"]["2"]["tiny"]["moved"]
    with pytest.raises(X2DFDError, match="no face"):
        transfer("tiny", expert.net, [expert], [], np.zeros(0, bool))


def test_only_experts_with_a_gradient_are_attacked(crops: Pixels) -> None:
    """Bug prevented: an attack on a model that it cannot see, reported as resistance."""
    with pytest.raises(UnknownName, match="one logit"):
        attackable("spectrum-noise")
    net = attackable("upsampling")
    changed = pgd(net, np.repeat(np.repeat(crops[:1], 2, 1), 2, 2), np.array([True]), 4, steps=2)
    assert changed.shape == (1, 64, 64, 3)


def test_a_limit_takes_both_labels() -> None:
    """Bug prevented: the first rows of a manifest are of one label, and its AUC is undefined."""
    samples = [Sample(str(i), Path("x"), "fake" if i < 3 else "real", group=str(i)) for i in range(20)]
    data = CropSet(samples, np.zeros((20, 8, 8, 3), np.uint8), np.zeros((20, 468, 2), np.float32), {})
    for limit, fakes in ((10, 3), (4, 2), (None, 3)):
        faces, fake = faces_of(data, limit)
        assert len(faces) == (limit or 20) and fake.sum() == fakes


# --- text in the picture ---------------------------------------------------------------------------------------------


def test_there_are_two_hundred_different_overlays_that_can_be_read(astronaut: Pixels) -> None:
    """Bug prevented: text that lies outside the picture, or 200 times the same."""
    assert len(OVERLAYS) == len(set(OVERLAYS)) == 200
    before = astronaut.copy()
    for overlay in OVERLAYS[::7]:
        for pixels in (astronaut, astronaut[:200, :300]):
            made = overlay(pixels)
            changed = (made != pixels).any(2)
            assert made.shape == pixels.shape and 0.003 < changed.mean() < 0.25
            assert changed[:, 2:-2].any() and ((made > 200).all(2) & changed).sum() > 40
    assert np.array_equal(astronaut, before)


class Reader:
    """Believes what is written: whiter pictures are real, and some texts hide the face from it."""

    facts: ClassVar[dict[str, Any]] = {"name": "reader"}

    def __init__(self, flips_on: frozenset[bytes], blind_on: frozenset[bytes] = frozenset()) -> None:
        self.flips_on, self.blind_on = flips_on, blind_on

    def detect_many(self, sources: Any, *, batch_size: int, rationale: bool) -> Any:
        for source in sources:
            pixels = np.asarray(Image.open(io.BytesIO(source)))
            key = pixels.tobytes()
            p = None if key in self.blind_on else 0.1 if key in self.flips_on else 0.9
            verdict = (
                Verdict("inconclusive", None, "no_face") if p is None else Verdict("real" if p < 0.5 else "fake", p)
            )
            face = FaceReport(0, (0.0, 0.0, 9.0, 9.0), 1.0, verdict, p, "", (), ())
            yield Report("x", "0", {}, verdict, (face,), "", (), (), {}, self.facts, {}, {})


def test_flips_are_counted_by_what_the_text_claims(astronaut: Pixels, face_photo: Path) -> None:
    """Bug prevented: a face lost under the text counted as a flip, or flips by any painted letters called reading."""
    pixels = np.asarray(Image.open(face_photo))
    painted = {o: o(pixels).tobytes() for o in OVERLAYS}
    real = [painted[o] for o in OVERLAYS if o.claim == "real"]
    neutral = [painted[o] for o in OVERLAYS if o.claim == "neutral"]
    sample = Sample("a", face_photo, "fake", group="g")
    found = flips(Reader(frozenset(real[:20]), frozenset(neutral[:10])), [sample])
    claims = found["claims"]
    assert (found["overlays"], found["pictures"], found["groups"]) == (200, 1, 1)
    assert (claims["real"]["n"], claims["real"]["flip_rate"], claims["real"]["to"]) == (80, 0.25, {"real": 20})
    assert claims["real"]["p_mllm_moved"] == pytest.approx(-0.8 * 0.25)
    assert (claims["fake"]["flip_rate"], claims["fake"]["interval"][0]) == (0.0, 0.0)
    assert (claims["neutral"]["n"], claims["neutral"]["unscored"], claims["neutral"]["flip_rate"]) == (30, 10, 0.0)
    assert claims["all"]["flip_rate"] == pytest.approx(20 / 190)
    page = tables.overlays({"o": {"task": {"name": "overlays"}, "manifest_sha256": "ab" * 32, "model": "m"} | found})
    assert "| real | 25.0 %" in page and "of 80 | real 20 | -0.20 | -0.20 |" in page and "| – | +0.00" in page
    with pytest.raises(X2DFDError, match="no sample gets a verdict"):
        flips(Reader(frozenset(), frozenset([pixels.tobytes()])), [sample])

"""The data types of the project: frozen dataclasses that its rooms exchange.

This file imports neither torch nor numpy, so that `import x2dfd` stays instant.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

from x2dfd.files import Json, checked, parse_json, to_dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

MLLM = "mllm"
"""The name of the MLLM's own score among those of the experts."""

AREAS: tuple[str, ...] = (
    "forehead", "eyebrows", "eyes", "nose", "mouth", "teeth", "cheeks", "jaw", "ears", "hair", "skin",
    "face-contour", "neck", "background", "accessories", "whole-image",
)  # fmt: skip
"""The areas of cues. Forging, questions, rationales and scoring use this list and no other."""

ARTIFACTS: tuple[str, ...] = (
    "texture", "lighting", "blending", "blur", "colour", "asymmetry", "geometry", "missing-detail",
    "expression", "noise", "frequency", "compression",
)  # fmt: skip
"""The kinds of faults in an area."""

DF_CLASSES: tuple[str, ...] = ("FS", "FR", "FE", "EFS", "real")
"""Face swapping, face reenactment, face editing, entire face synthesis, bona fide (arXiv 2501.01164)."""

KINDS: tuple[str, ...] = ("whole", "part")
"""Kinds of fakes: the face as a whole by a generator (EFS), or a photo that was changed in part (FS, FR, FE)."""

Label = Literal["fake", "real", "inconclusive"]


@dataclass(frozen=True)
class Cue:
    """A visible sign of forgery: an artifact at an area."""

    area: str  # one of AREAS
    artifact: str  # one of ARTIFACTS
    score: float | None = None  # how clearly it shows, 0..1; None when nobody measured it

    def __post_init__(self) -> None:
        if self.area not in AREAS or self.artifact not in ARTIFACTS:
            raise ValueError(f"cue outside the vocabulary: {self.area} x {self.artifact}")


@dataclass(frozen=True)
class Evidence:
    """One expert's report about one face."""

    expert: str  # the expert's registered name
    score: float | None  # P(fake) in [0, 1]; None when the expert could not judge
    note: str | None = None  # why there is no score, or a remark for the reader
    cues: tuple[Cue, ...] = ()  # most likely first, with the probability; empty for most experts
    map: tuple[tuple[float, ...], ...] = field(default=(), repr=False)  # rows of a square grid over the aligned crop:
    # P(changed) for each cell; empty for most experts
    kinds: dict[str, float] = field(default_factory=dict)  # P(fake of that kind) for each of KINDS; empty for most
    no_photo: float | None = None  # P(a drawing, a painting or a render instead of a photograph); None for most


@dataclass(frozen=True)
class Verdict:
    """The answer about a face, an image or a video."""

    label: Label
    p_fake: float | None  # calibrated probability; None when nothing could be assessed
    reason: str | None = None  # why inconclusive: `no_face`, `in_band`, `not_a_photograph`
    kind: str | None = None  # of a fake, one of KINDS; None for any other answer, and where no expert tells it

    @property
    def side(self) -> str:
        """The label that a rationale explains; for an inconclusive verdict the likelier one."""
        if self.label != "inconclusive":
            return self.label
        return "fake" if (self.p_fake or 0.0) >= 0.5 else "real"


@dataclass(frozen=True, eq=False)
class Face:
    """A face found in a picture, and the aligned crop that every model gets."""

    index: int  # position in the picture's list of faces, largest first; of a video, over all its frames
    box: tuple[float, float, float, float]  # x, y, width, height in picture pixels
    landmarks: NDArray[np.float32]  # [468, 2] mesh points in picture pixels
    confidence: float  # the face detector's own score, 0..1
    crop: NDArray[np.uint8]  # [CROP_SIZE, CROP_SIZE, 3] RGB, eyes level, margin 1.3 around the mesh
    crop_landmarks: NDArray[np.float32]  # [468, 2] mesh points in crop pixels
    roll_degrees: float  # tilt of the head in the picture; the crop is upright
    large: NDArray[np.uint8] | None = None  # the same crop [s, s, 3] for an MLLM that takes a larger one than experts

    @property
    def view(self) -> NDArray[np.uint8]:
        """The crop for the MLLM."""
        return self.crop if self.large is None else self.large


@dataclass(frozen=True)
class Card:
    """The facts about a set of weights."""

    name: str
    version: str
    source: str  # where the weights come from (trained here, a paper's release, ...)
    licence: str
    sha256: str  # of the weight file; empty only when `weights` is empty
    preprocessing: str  # from a face to the model's input
    paper: str  # title and year, or arXiv number
    blind_spot: str  # the forgeries that it misses: the first thing a reader must know
    weights: str = ""  # file name in the card's folder
    trained_on: str = ""  # data, in words
    figures: Json = field(default_factory=dict)  # measured, with n and interval
    covers: tuple[str, ...] = ()  # artifacts, "AREA ARTIFACT" pairs and classes of forgeries that an expert covers

    def __post_init__(self) -> None:
        """Raises ValueError for an entry of `covers` outside of the vocabulary."""
        pairs = {f"{area} {artifact}" for area in AREAS for artifact in ARTIFACTS}
        if unknown := set(self.covers) - pairs - {*ARTIFACTS, *DF_CLASSES}:
            raise ValueError(f"covers {sorted(unknown)}: none is an artifact, a pair `AREA ARTIFACT` or a class")

    def covers_cue(self, area: str, artifact: str) -> bool:
        return artifact in self.covers or f"{area} {artifact}" in self.covers

    def to_dict(self) -> Json:
        return {**asdict(self), "covers": list(self.covers)}

    @classmethod
    def from_dict(cls, data: Json) -> Self:
        """Raises ValueError for a missing, unknown or misshapen field."""
        return checked(cls, data)


@dataclass(frozen=True)
class ModelInfo:
    """The model as every report states it. Two answers can be compared where all of this agrees, texts excepted."""

    name: str
    base: dict[str, str]  # name and SHA-256 of the base model's weights
    adapter_sha256: str | None = None
    layers: dict[str, int | list[int]] | None = None  # used ones of `tower` and `text`
    prompt_sha256: str = ""
    crops_through: str = ""  # the codec that every crop goes through, and what the tower sees of it
    crop_size: int = 224  # side of the MLLM's crops
    experts: dict[str, str] = field(default_factory=dict)  # name -> version and SHA-256 of the weights
    in_prompt: list[str] = field(default_factory=list)  # experts whose scores are in the prompt
    aliases: dict[str, str] | None = None  # name -> its name in the prompt, where that is another
    temperature: float = 0.0
    score_form: str = "numbers"
    held_out: list[str] = field(default_factory=list)  # forge methods that were kept out of its training
    blind_spot: str = ""
    licence: str = ""
    runs_on: str | None = None  # device and precision of a local model
    served: dict[str, str] | None = None  # host and name of a served one
    asked_with: str | None = None  # the form of scores in questions, where it is not that of training
    mode: str = "calibrated"
    threshold: float | None = None  # of p_fake in this mode
    band: list[float] | None = None  # p_fake without an answer lies between these
    weights: dict[str, float] | None = None  # of MLLM and experts in the calibration, the larger one of both kinds
    counts_for: dict[str, list[str]] | None = None  # kind of fake -> MLLM and experts with a weight for it
    calibration_sha256: str | None = None
    validation: Json | None = None  # summary of the validation run
    validation_sha256: str | None = None

    def to_dict(self) -> Json:
        """As `Report.model` holds it, without some fields where they have their default."""
        defaults: Json = dict.fromkeys(("aliases", "runs_on", "served", "asked_with")) | {"crop_size": 224}
        return {k: v for k, v in asdict(self).items() if k not in defaults or v != defaults[k]}


@dataclass(frozen=True)
class FaceReport:
    """Everything reported about one face."""

    index: int  # position in the picture's list of faces; of a video, in the list over all its frames
    box: tuple[float, float, float, float]  # x, y, width, height in picture pixels
    confidence: float  # of the face detector
    verdict: Verdict
    p_fake_mllm: float | None  # the MLLM's own P(fake), as in X2-DFD
    rationale: str  # "" when not asked for
    cues: tuple[Cue, ...]  # read from the rationale
    evidence: tuple[Evidence, ...]
    contradictions: tuple[str, ...] = ()  # of the rationale to verdict or evidence
    areas: dict[str, list[list[list[float]]]] = field(default_factory=dict)  # area -> polygons in picture pixels
    crop: tuple[tuple[float, float], ...] = ()  # corners of the aligned crop in picture pixels: top left, right, bottom
    frame: int | None = None  # frame number in a video
    time_s: float | None = None  # its time in seconds

    def suspicion(self) -> float:
        """P(fake) to order faces by; below all others where there is no estimate."""
        return -1.0 if self.verdict.p_fake is None else self.verdict.p_fake


@dataclass(frozen=True)
class Report:
    """The answer about one file; `to_json` and `from_json` lose nothing."""

    path: str | None  # as given by the caller; None for bytes and PIL images
    sha256: str  # of the file's bytes
    media: Json  # kind, format, width, height, n_frames, and the changes by decoding (`notes`)
    verdict: Verdict  # image: the most suspicious face; video: see Detector
    faces: tuple[FaceReport, ...]
    rationale: str  # of the face that decided
    cues: tuple[Cue, ...]  # of the face that decided
    evidence: tuple[Evidence, ...]  # of the face that decided
    provenance: Json  # C2PA state, and `statements` of the file about how it was made; never in p_fake
    model: Json  # names, hashes, layer counts, mode, threshold and band in force
    versions: dict[str, str]
    # Seconds per stage, for the whole batch of `files` files. Decoding and face finding may have run while the batch
    # before it was judged.
    timings: dict[str, float]
    warnings: tuple[str, ...] = ()
    likelihood_ratio: Json = field(default_factory=dict)  # `value`, `interval`, `limits`, `run`,
    # `propositions`; or `value` None and the `reason`

    @property
    def decider(self) -> FaceReport | None:
        """The face that decided, the most suspicious one, whose rationale, cues and evidence the report repeats."""
        return max(self.faces, key=FaceReport.suspicion, default=None)

    @property
    def uncounted(self) -> frozenset[str]:
        """Experts that were asked and have no weight of their own in a calibrated verdict."""
        if (weights := self.model.get("weights")) is None:
            return frozenset()
        asked = {e.expert for evidence in (self.evidence, *(f.evidence for f in self.faces)) for e in evidence}
        return frozenset(name for name in asked if weights.get(name, 0) <= 0)

    def __str__(self) -> str:
        """The answer as text for people."""
        from x2dfd.answer import summary

        return summary(self)

    def to_dict(self) -> Json:
        """As plain values. A map is only in its face's evidence, not in the copy of it in the report's own evidence."""
        data = asdict(self)
        if any(face.evidence == self.evidence for face in self.faces):
            for evidence in data["evidence"]:
                del evidence["map"]
        return data

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Json) -> Self:
        report = to_dataclass(cls, data)
        if any("map" in e for e in data["evidence"]):
            return report
        # `to_dict` left them out
        matches = [f for f in report.faces if tuple(replace(e, map=()) for e in f.evidence) == report.evidence]
        return replace(report, evidence=max(matches, key=FaceReport.suspicion).evidence) if matches else report

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(parse_json(text))


def result_of(data: Json) -> Report | Failure:
    """A Report or a Failure from its `to_dict`. Raises ValueError, KeyError or TypeError for anything else."""
    return Failure(data["path"], data["sha256"], **data["error"]) if "error" in data else Report.from_dict(data)


def renamed(results: Sequence[Report | Failure], names: Sequence[str | None]) -> list[Report | Failure]:
    """The results under other names for their files, which the reasons of failures then have too."""
    made: list[Report | Failure] = []
    for result, name in zip(results, names, strict=True):
        if isinstance(result, Failure) and result.path and name:
            whole = rf"(?<![\w/.-]){re.escape(result.path)}(?![\w/-])"  # "a" is a name and a word, "-" a sign
            result = replace(result, reason=re.sub(whole, name.replace("\\", r"\\"), result.reason))
        made.append(replace(result, path=name))
    return made


MAX_FRAMES = 1000
"""Frames that can be asked of a clip, as memory holds the crops of all; `verify` takes no record that states more."""


def frames_asked(media: Json) -> int | None:
    """The number of frames that were requested of the clip of a `Report.media`; None for a picture."""
    if media.get("kind") != "video":
        return None
    return int(media["frames_asked"])


@dataclass(frozen=True)
class Failure:
    """A file that could not be judged; the run goes on."""

    path: str | None
    sha256: str | None  # None when not even the bytes could be read
    code: str
    reason: str

    def to_dict(self) -> Json:
        return {"path": self.path, "sha256": self.sha256, "error": {"code": self.code, "reason": self.reason}}

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)

"""Calibration: one probability from the scores of experts and MLLM, the rule when to abstain, and the fit of both.

Each kind of fake (made as a whole, changed in part) has a regularised logistic of its own, with non-negative weights
over a handful of logits. Their odds add up, so an expert that knows one kind cannot clear the other. A missing score
counts as its mean in the fit, so it neither accuses nor clears.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from x2dfd.errors import SetupError
from x2dfd.files import Json, bad_rate, checked, json_sha256, parse_json, write_text
from x2dfd.types import KINDS, Evidence, Verdict

MLLM = "mllm"
FALSE_ALARMS = 0.05  # share of a source's real pictures that may be called fake
MISSES = 0.10  # share of the fakes of one kind and source that may be called real
SMALL = 50  # pictures that a source needs for a threshold of its own: of fewer, a tenth are two or three
_CLIP = 6.0  # logits beyond this say no more about certainty than about saturation
_MAX_LOGIT = 700.0  # exp of more is no float
RATES = ("rate", "answered", "fakes_found", "false_alarms_allowed")  # in `fitted_on`, at any depth

Floats = NDArray[np.float64]
Logits = Mapping[str, Mapping[str, float | None]]
"""By kind of fake and by name, the logit that an expert or the MLLM gives for it; None where there is no score."""


def logit(p: float) -> float:
    """log(p / (1 - p)), bounded."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


def kind_of(df_class: str) -> str:
    """The kind of a fake of a class: EFS is made as a whole, every other one is changed in part. Raises ValueError."""
    if df_class not in ("EFS", "FS", "FR", "FE"):
        raise ValueError(f"{df_class!r} is no class of fakes")
    return KINDS[0] if df_class == "EFS" else KINDS[1]


def logits_of(mllm_logit: float | None, evidence: Sequence[Evidence], covers: Mapping[str, Sequence[str]]) -> Logits:
    """The logits that the logistics of both kinds join.

    An expert whose card names the classes that it covers counts for their kinds alone (`covers`: name -> classes).
    """
    found: dict[str, dict[str, float | None]] = {kind: {MLLM: mllm_logit} for kind in KINDS}
    for e in evidence:
        classes = [c for c in covers.get(e.expert, ()) if c in ("EFS", "FS", "FR", "FE")]
        for kind in {kind_of(c) for c in classes} or KINDS:
            found[kind][e.expert] = None if e.score is None else logit(e.score)
    return found


@dataclass(frozen=True)
class Logistic:
    """P(fake of one kind) from logits."""

    weights: dict[str, float]  # per score: `mllm` and the experts' names
    means: dict[str, float]  # mean logit of each score where it was fitted; replaces a missing one
    bias: float

    def __call__(self, logits: Mapping[str, float | None]) -> float:
        """The probability. Raises ValueError for a logit that is not finite."""
        total = self.bias
        for name, weight in self.weights.items():
            value = logits.get(name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} gave {value}, which is no logit")
            total += 0.0 if value is None else weight * (max(-_CLIP, min(_CLIP, value)) - self.means[name])
        return 1 / (1 + math.exp(-total))


@dataclass(frozen=True)
class Calibration:
    """The fitted logistics and the decision rule; `calibration.json` in the adapter directory."""

    kinds: dict[str, Logistic]  # of x2dfd.types.KINDS
    low: float  # below: real
    high: float  # from here on: fake; between: inconclusive
    mllm_threshold: float = 0.5  # P(fake) of the MLLM alone at which mode="paper" says fake
    fitted_on: Json = field(default_factory=dict)  # n, groups, sources, rates promised

    @property
    def weights(self) -> dict[str, float]:
        """The larger weight of each score in the two logistics: 0 where it decides nothing.

        That holds of an expert, too, which was asked at the fit and whose scores no logistic takes.
        """
        names = dict.fromkeys(name for one in self.kinds.values() for name in one.weights)
        names |= dict.fromkeys(self.fitted_on.get("experts", {}))
        return {n: max(one.weights.get(n, 0.0) for one in self.kinds.values()) for n in names}

    def by_kind(self, logits: Logits) -> dict[str, float]:
        """P(fake of that kind) for each kind that was fitted."""
        return {kind: logistic(logits[kind]) for kind, logistic in self.kinds.items()}

    def probability(self, logits: Logits) -> float:
        """P(fake): the kinds exclude each other, so that their odds against a real photo add up."""
        odds = sum(p / max(1 - p, 1e-12) for p in self.by_kind(logits).values())
        return odds / (1 + odds)

    def verdict(self, p_fake: float, kind: str | None = None) -> Verdict:
        """Fake (of the likelier `kind`, where it is known), real, or no answer; the last two are of no kind."""
        if self.low <= p_fake < self.high:
            return Verdict("inconclusive", p_fake, "in_band")
        return Verdict("fake", p_fake, None, kind) if p_fake >= self.high else Verdict("real", p_fake)

    @property
    def sha256(self) -> str:
        """Hash of the whole rule and of the facts about its fit."""
        return json_sha256(asdict(self))

    def save(self, folder: Path) -> None:
        write_text(folder / "calibration.json", json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """Raises SetupError when the file is absent, incomplete or contradicts itself."""
        path = folder / "calibration.json"
        try:
            found = checked(cls, parse_json(path.read_bytes()))
            found._check()
        except (OSError, ValueError) as error:
            raise SetupError(
                f"{path} cannot be read: {error}. Make it: x2dfd calibrate", code="calibration_unreadable"
            ) from error
        return found

    def _check(self) -> None:
        """Raises ValueError for numbers that no fit gives."""
        # `choose_band` may set a threshold 1e-6 above a score of 1.
        if not 0 <= self.low <= self.high <= 1 + 1e-6:
            raise ValueError(f"its band from {self.low} to {self.high} is none of probabilities")
        if not 0 <= self.mllm_threshold <= 1:
            raise ValueError(f"its mllm_threshold {self.mllm_threshold} is no probability")
        if not self.kinds or self.kinds.keys() - set(KINDS):
            raise ValueError(f"its kinds of fake are {', '.join(self.kinds) or 'none'}, not {', '.join(KINDS)}")
        for one in self.kinds.values():
            if lacking := sorted(one.weights.keys() - one.means.keys()):
                raise ValueError(f"it has no mean of {lacking[0]!r}")
            reach = abs(one.bias) + sum(abs(w) * (_CLIP + abs(one.means[name])) for name, w in one.weights.items())
            if min(one.weights.values(), default=0) < 0 or not reach <= _MAX_LOGIT:
                raise ValueError("a weight is negative, or its numbers are too large for a probability")
        experts = self.fitted_on.get("experts", {})
        if not isinstance(experts, dict) or not all(isinstance(sha256, str) for sha256 in experts.values()):
            raise ValueError("`fitted_on.experts` names no weights by their SHA-256")
        if (wrong := bad_rate(self.fitted_on, RATES)) is not None:
            raise ValueError(f"`fitted_on.{wrong}` is no rate from 0 to 1")


def fit_logistic(logits: Mapping[str, Floats], labels: Floats, weights: Floats, ridge: float = 0.02) -> Logistic:
    """The logistic of one kind. `logits`: name -> logits [n], NaN where a score is missing; `weights` [n] balance them.

    Weights are not negative: an expert whose score counts against itself has learnt the calibration pictures, not
    forgeries. SciPy's bounded L-BFGS on the ridge-penalised log-likelihood.
    """
    from scipy.optimize import minimize

    names, w = list(logits), weights / weights.sum()
    means = {n: _mean(np.clip(logits[n], -_CLIP, _CLIP), w) for n in names}
    columns = [np.nan_to_num(np.clip(logits[n], -_CLIP, _CLIP) - means[n], nan=0.0) for n in names]
    x = np.stack([*columns, np.ones(len(labels))], 1)

    def loss(beta: Floats) -> tuple[float, Floats]:
        z = x @ beta
        p = 1 / (1 + np.exp(-z))
        value = float(w @ (np.logaddexp(0, z) - labels * z)) + ridge / 2 * float(beta[:-1] @ beta[:-1])
        return value, x.T @ (w * (p - labels)) + ridge * np.append(beta[:-1], 0.0)

    bounds = [(0, None)] * len(names) + [(None, None)]
    beta = minimize(loss, np.zeros(len(names) + 1), jac=True, method="L-BFGS-B", bounds=bounds).x
    fitted = {n: round(float(b), 6) for n, b in zip(names, beta, strict=False)}
    return Logistic(fitted, {n: round(v, 6) for n, v in means.items()}, round(float(beta[-1]), 6))


def _mean(logits: Floats, weights: Floats) -> float:
    """Mean of the scores that there are, weighted as the fit is; 0 where there are none."""
    there = np.isfinite(logits)
    return float(np.average(logits[there], weights=weights[there])) if weights[there].sum() > 0 else 0.0


def balance(labels: Floats, sources: Sequence[str]) -> Floats:
    """Weights that give each label a half, and in each label the root of a source's size: [n]."""
    names = np.array(sources)
    weights = np.zeros(len(labels))
    for label in (0, 1):
        for name in set(names[labels == label]):
            mine = (labels == label) & (names == name)
            weights[mine] = mine.sum() ** -0.5
        weights[labels == label] /= max(2 * weights[labels == label].sum(), 1e-12)
    return weights


def fit_calibration(
    logits: Mapping[str, Mapping[str, Floats]],
    kinds: Sequence[str],
    sources: Sequence[str],
    *,
    false_alarms: float = FALSE_ALARMS,
) -> Calibration:
    """Logistics and band. `logits`: kind -> name -> logits [n]; `kinds` [n]: a kind of KINDS, or "" for a real picture.

    `sources` [n]: of a real picture its source; of a fake what is bounded together, its generator or method and source.
    """
    of = np.array(kinds)
    logistics = {}
    for kind in KINDS:
        rows = (of == "") | (of == kind)
        labels = (of[rows] == kind).astype(float)
        if not 0 < labels.sum() < len(labels):
            continue
        own = {n: v[rows] for n, v in logits[kind].items() if np.isfinite(v[rows]).any()}
        logistics[kind] = fit_logistic(own, labels, balance(labels, np.array(sources)[rows].tolist()))
    # Each was fitted as if every second picture were of its kind: the kinds share the half that is fake.
    share = math.log(max(1, len(logistics)))
    logistics = {kind: replace(one, bias=round(one.bias - share, 6)) for kind, one in logistics.items()}
    fitted = Calibration(logistics, 0.5, 0.5)
    chances = probabilities(fitted, logits, len(of))
    low, high = choose_band(chances, of != "", sources, false_alarms=false_alarms)
    return Calibration(logistics, low, high)


def probabilities(calibration: Calibration, logits: Mapping[str, Mapping[str, Floats]], n: int) -> Floats:
    """Calibrated P(fake) of n pictures, from the arrays of `fit_calibration`."""
    rows: list[Logits] = [
        {k: {name: None if math.isnan(v[i]) else float(v[i]) for name, v in of.items()} for k, of in logits.items()}
        for i in range(n)
    ]
    return np.array([calibration.probability(row) for row in rows])


def choose_band(
    p_fake: Floats,
    fake: NDArray[np.bool_],
    sources: Sequence[str],
    *,
    false_alarms: float = FALSE_ALARMS,
    misses: float = MISSES,
) -> tuple[float, float]:
    """(low, high): of every source at most `false_alarms` of the reals reach `high`, and `misses` of the fakes stay
    below `low`.

    The worst source sets each. Sources with fewer than SMALL pictures count together. Where the two bounds leave no
    room for doubt, they meet halfway: no picture is both.
    """
    names = np.array(sources)
    high = max(_above(scores, false_alarms) for scores in _by_source(p_fake[~fake], names[~fake]))
    low = min(1 - _above(1 - scores, misses) for scores in _by_source(p_fake[fake], names[fake]))
    if low > high:
        low = high = (low + high) / 2
    return round(max(low, 0.0), 6), round(high, 6)  # above 1 where a source's photos reach 1: nothing is fake then


def _by_source(scores: Floats, names: NDArray[np.str_]) -> list[Floats]:
    sources = [scores[names == name] for name in sorted(set(names))]
    large = [s for s in sources if len(s) >= SMALL]
    small = [s for s in sources if len(s) < SMALL]
    return [*large, np.concatenate(small)] if small else large


def _above(scores: Floats, share: float) -> float:
    """Smallest threshold that at most `share` of the scores reach."""
    ordered = np.sort(scores)[::-1]
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)]) + 1e-6

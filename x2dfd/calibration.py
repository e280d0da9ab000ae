"""Calibration: one probability from the scores of experts and MLLM, the rule when to abstain, and the fit of both.

Each kind of fake (made as a whole, changed in part) has a regularised logistic of its own, with non-negative weights
over a handful of logits. Their odds add up, so an expert that knows one kind cannot clear the other. A missing score is
replaced by its mean in the fit, so it neither accuses nor clears.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from x2dfd.errors import SetupError
from x2dfd.files import Json, bad_rate, checked, json_sha256, parse_json, write_text
from x2dfd.types import KINDS, MLLM, Evidence, Verdict

FALSE_ALARMS = 0.05  # share of a source's real pictures that may be called fake
MISSES = {"whole": 0.10, "part": 0.15}
"""By kind, the share of the fakes of one generator or source that may be called real. Many changes of a part are too
faint for anybody to see: with 0.10 for them, too, 45 % of the calibration pictures get an answer, not 50 % (LOG.md)."""
SMALL = 50  # pictures that a source needs for its own threshold; a tenth of fewer is two or three
FEW = 50  # real pictures, and fakes, below which probabilities near 0 and 1 are not supported
_CLIP = 6.0  # larger logits are saturated and say nothing more about certainty
_MAX_LOGIT = 700.0  # exp overflows above
RATES = ("answered", "fakes_found", "false_alarms_allowed")  # in `fitted_on`, beside those of each source

Floats = NDArray[np.float64]
Logits = Mapping[str, Mapping[str, float | None]]
"""Kind of fake -> name of an expert or `mllm` -> logit; None where there is no score."""


def logit(p: float) -> float:
    """log(p / (1 - p)), bounded."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


def sigmoid(logit: Floats | float) -> Floats:
    """The probability of a logit, or of each of an array."""
    return np.asarray(1 / (1 + np.exp(-logit)))


def kind_of(df_class: str) -> str:
    """The kind of a class of fakes: EFS is made as a whole, the others are changed in part. Raises ValueError."""
    if df_class not in ("EFS", "FS", "FR", "FE"):
        raise ValueError(f"{df_class!r} is not a class of fakes")
    return KINDS[0] if df_class == "EFS" else KINDS[1]


def logits_of(mllm_logit: float | None, evidence: Sequence[Evidence], covers: Mapping[str, Sequence[str]]) -> Logits:
    """The inputs of the logistics of both kinds.

    `covers`: name -> the classes on an expert's card. An expert with such classes counts for their kinds alone.
    """
    logits: dict[str, dict[str, float | None]] = {kind: {MLLM: mllm_logit} for kind in KINDS}
    for e in evidence:
        classes = [c for c in covers.get(e.expert, ()) if c in ("EFS", "FS", "FR", "FE")]
        for kind in {kind_of(c) for c in classes} or KINDS:
            logits[kind][e.expert] = None if e.score is None else logit(e.score)
    return logits


@dataclass(frozen=True)
class Logistic:
    """P(fake of one kind) from logits."""

    weights: dict[str, float]  # per score: `mllm` and the experts' names
    means: dict[str, float]  # mean logit of each score in the fit; replaces a missing one
    bias: float

    def __call__(self, logits: Mapping[str, float | None]) -> float:
        """The probability. Raises ValueError for a logit that is not finite."""
        total = self.bias
        for name, weight in self.weights.items():
            value = logits.get(name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} gave {value}, which is not a logit")
            total += 0.0 if value is None else weight * (max(-_CLIP, min(_CLIP, value)) - self.means[name])
        return 1 / (1 + math.exp(-total))


@dataclass(frozen=True)
class Calibration:
    """The fitted logistics and the decision rule; `calibration.json` in the adapter directory."""

    kinds: dict[str, Logistic]  # of x2dfd.types.KINDS
    low: float  # below: real
    high: float  # at or above: fake; between the two: inconclusive
    mllm_threshold: float = 0.5  # P(fake) of the MLLM alone at which mode="paper" says fake
    fitted_on: Json = field(default_factory=dict)  # n, groups, sources, rates promised

    @property
    def weights(self) -> dict[str, float]:
        """The larger weight of each score in the two logistics: 0 where it decides nothing.

        That holds of an expert, too, which was asked at the fit and whose scores no logistic takes.
        """
        names = dict.fromkeys(name for logistic in self.kinds.values() for name in logistic.weights)
        names |= dict.fromkeys(self.fitted_on.get("experts", {}))
        return {n: max(logistic.weights.get(n, 0.0) for logistic in self.kinds.values()) for n in names}

    def counts(self, name: str) -> bool:
        """Whether an expert's score, or the MLLM's, has a weight in the verdict."""
        return self.weights.get(name, 0.0) > 0

    def missing(self, experts: Collection[str]) -> list[str]:
        """The experts with a weight in the verdict that are not among the given ones."""
        return [name for name in self.weights if self.counts(name) and name not in {MLLM, *experts}]

    def by_kind(self, logits: Logits) -> dict[str, float]:
        """P(fake of this kind) for each fitted kind."""
        return {kind: logistic(logits[kind]) for kind, logistic in self.kinds.items()}

    def probability(self, logits: Logits) -> float:
        """P(fake). The kinds exclude each other, so their odds against a real photo add up."""
        odds = sum(p / max(1 - p, 1e-12) for p in self.by_kind(logits).values())
        return odds / (1 + odds)

    def verdict(self, p_fake: float, kind: str | None = None) -> Verdict:
        """Fake (with the likelier `kind`, if known), real, or no answer; the last two have no kind."""
        if self.low <= p_fake < self.high:
            return Verdict("inconclusive", p_fake, "in_band")
        return Verdict("fake", p_fake, None, kind) if p_fake >= self.high else Verdict("real", p_fake)

    @property
    def few_pictures(self) -> str | None:
        """What a reader must know of a fit to few pictures; None where there were enough, or the file does not say."""
        n_real, n_fake = self.fitted_on.get("n_real", FEW), self.fitted_on.get("n_fake", FEW)
        if min(n_real, n_fake) >= FEW:
            return None
        counts = f"fitted on {n_real} real and {n_fake} fake pictures"
        return f"{counts}: probabilities near 0 and 1 are not supported by so few"

    @property
    def sha256(self) -> str:
        """Hash of the rule and of the facts about its fit."""
        return json_sha256(asdict(self))

    def save(self, folder: Path) -> None:
        write_text(folder / "calibration.json", json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """Read `calibration.json`. Raises SetupError when it is absent, incomplete or contradicts itself."""
        path = folder / "calibration.json"
        try:
            calibration = checked(cls, parse_json(path.read_bytes()))
            calibration._check()
        except (OSError, ValueError) as error:
            raise SetupError(
                f"{path} cannot be read: {error}. Make it: x2dfd calibrate", code="calibration_unreadable"
            ) from error
        return calibration

    def _check(self) -> None:
        """Raises ValueError for numbers that a fit cannot give."""
        # `choose_band` may set a threshold 1e-6 above a score of 1.
        if not 0 <= self.low <= self.high <= 1 + 1e-6:
            raise ValueError(f"its band from {self.low} to {self.high} is not a range of probabilities")
        if not 0 <= self.mllm_threshold <= 1:
            raise ValueError(f"its mllm_threshold {self.mllm_threshold} is not a probability")
        if not self.kinds or self.kinds.keys() - set(KINDS):
            raise ValueError(f"its kinds of fake are {', '.join(self.kinds) or 'none'}, not {', '.join(KINDS)}")
        for fit in self.kinds.values():
            if missing := sorted(fit.weights.keys() - fit.means.keys()):
                raise ValueError(f"it has no mean of {missing[0]!r}")
            reach = abs(fit.bias) + sum(abs(w) * (_CLIP + abs(fit.means[name])) for name, w in fit.weights.items())
            if min(fit.weights.values(), default=0) < 0 or not reach <= _MAX_LOGIT:
                raise ValueError("a weight is negative, or its numbers are too large for a probability")
        experts = self.fitted_on.get("experts", {})
        if not isinstance(experts, dict) or not all(isinstance(sha256, str) for sha256 in experts.values()):
            raise ValueError("`fitted_on.experts` names no weights by their SHA-256")
        weighted = {name for fit in self.kinds.values() for name in fit.weights}
        if unnamed := sorted(weighted - {MLLM} - experts.keys()):
            raise ValueError(f"`fitted_on.experts` does not name the weights of {unnamed[0]!r}, whose score it takes")
        for key in ("n_real", "n_fake"):
            if key in self.fitted_on and (type(n := self.fitted_on[key]) is not int or n < 1):
                raise ValueError(f"`fitted_on.{key}` is not a number of pictures")
        rates = {key: self.fitted_on[key] for key in RATES if key in self.fitted_on}
        for key in ("false_alarms", "misses", "misses_allowed"):  # by the sources' names, which may be any
            if not isinstance(entries := self.fitted_on.get(key, {}), dict):
                raise ValueError(f"`fitted_on.{key}` is not an object")
            for name, entry in entries.items():
                rates[f"{key}.{name}"] = entry.get("rate", -1) if isinstance(entry, dict) else entry
        if (place := bad_rate(rates, rates)) is not None:
            raise ValueError(f"`fitted_on.{place}` is not a rate from 0 to 1")


def fit_logistic(logits: Mapping[str, Floats], labels: Floats, weights: Floats, ridge: float = 0.02) -> Logistic:
    """The logistic of one kind. `logits`: name -> logits [n], NaN if missing; `weights` [n] balance the pictures.

    Its weights are not negative: a negative one would fit the calibration pictures, not
    forgeries. SciPy's bounded L-BFGS on the ridge-penalised log-likelihood.
    """
    from scipy.optimize import minimize

    names, w = list(logits), weights / weights.sum()
    means = {n: _mean(np.clip(logits[n], -_CLIP, _CLIP), w) for n in names}
    columns = [np.nan_to_num(np.clip(logits[n], -_CLIP, _CLIP) - means[n], nan=0.0) for n in names]
    x = np.stack([*columns, np.ones(len(labels))], 1)

    def loss(beta: Floats) -> tuple[float, Floats]:
        z = x @ beta
        p = sigmoid(z)
        value = float(w @ (np.logaddexp(0, z) - labels * z)) + ridge / 2 * float(beta[:-1] @ beta[:-1])
        return value, x.T @ (w * (p - labels)) + ridge * np.append(beta[:-1], 0.0)

    bounds = [(0, None)] * len(names) + [(None, None)]
    beta = minimize(loss, np.zeros(len(names) + 1), jac=True, method="L-BFGS-B", bounds=bounds).x
    fitted = {n: round(float(b), 6) for n, b in zip(names, beta, strict=False)}
    return Logistic(fitted, {n: round(v, 6) for n, v in means.items()}, round(float(beta[-1]), 6))


def _mean(logits: Floats, weights: Floats) -> float:
    """Mean of the scores that are not missing, weighted as in the fit; 0 if all are."""
    present = np.isfinite(logits)
    return float(np.average(logits[present], weights=weights[present])) if weights[present].sum() > 0 else 0.0


def balance(labels: Floats, sources: Sequence[str]) -> Floats:
    """Weights [n]: each label gets half of the total, shared among its sources by the root of their sizes."""
    names = np.array(sources)
    weights = np.zeros(len(labels))
    for label in (0, 1):
        for name in set(names[labels == label]):
            rows = (labels == label) & (names == name)
            weights[rows] = rows.sum() ** -0.5
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

    `sources` [n]: each picture's group for the bounds on errors: its source, or the generator of a synthetic fake.
    """
    kind_array = np.array(kinds)
    logistics = {}
    for kind in KINDS:
        rows = (kind_array == "") | (kind_array == kind)
        labels = (kind_array[rows] == kind).astype(float)
        if not 0 < labels.sum() < len(labels):
            continue
        columns = {n: v[rows] for n, v in logits[kind].items() if np.isfinite(v[rows]).any()}
        logistics[kind] = fit_logistic(columns, labels, balance(labels, np.array(sources)[rows].tolist()))
    # Each was fitted as if half of the pictures were of its kind, but the kinds share the fake half.
    share = math.log(max(1, len(logistics)))
    logistics = {kind: replace(logistic, bias=round(logistic.bias - share, 6)) for kind, logistic in logistics.items()}
    fitted = Calibration(logistics, 0.5, 0.5)
    p_fake = probabilities(fitted, logits, len(kind_array))
    low, high = choose_band(p_fake, kind_array, sources, false_alarms=false_alarms)
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
    kinds: NDArray[np.str_],
    sources: Sequence[str],
    *,
    false_alarms: float = FALSE_ALARMS,
    misses: Mapping[str, float] = MISSES,
) -> tuple[float, float]:
    """(low, high): in every source at most `false_alarms` of the reals reach `high`, and at most `misses` of the fakes
    of a kind stay below `low`. `kinds` [n] as in `fit_calibration`.

    The worst source sets each. Sources with fewer than SMALL pictures are pooled. If low would exceed high, both become
    their mean, and there is no band.
    """
    names = np.array(sources)
    high = max(_threshold(scores, false_alarms) for scores in _by_source(p_fake[kinds == ""], names[kinds == ""]))
    low = min(
        1 - _threshold(1 - scores, share)
        for kind, share in misses.items()
        for scores in _by_source(p_fake[kinds == kind], names[kinds == kind])
    )
    if low > high:
        low = high = (low + high) / 2
    return round(max(low, 0.0), 6), round(high, 6)  # above 1 if a source's photos reach 1: then nothing is called fake


def _by_source(scores: Floats, names: NDArray[np.str_]) -> list[Floats]:
    sources = [scores[names == name] for name in sorted(set(names))]
    large = [s for s in sources if len(s) >= SMALL]
    small = [s for s in sources if len(s) < SMALL]
    return [*large, np.concatenate(small)] if small else large


def _threshold(scores: Floats, share: float) -> float:
    """The smallest threshold that at most `share` of the scores reach."""
    ordered = np.sort(scores)[::-1]
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)]) + 1e-6

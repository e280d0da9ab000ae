"""From the MLLM's logit and the experts' logits to one calibrated probability, and when to say "inconclusive".

A regularised logistic with non-negative weights over a handful of logits: small enough to read, stored as JSON with the
model. A score that is missing stands at its training mean, so it neither accuses nor clears. The "real" of an expert
for faces that are synthetic as a whole says nothing about a changed mouth: such a part counts from a floor on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from x2dfd.errors import SetupError
from x2dfd.files import json_sha256, write_text
from x2dfd.types import Verdict

MLLM = "mllm"
_CLIP = 6.0  # logits beyond this say no more about certainty than about saturation
FLOOR_SHARE = 0.7  # chosen on the calibration split: a higher floor finds more, but trusts more what is new to the part
UNSEEN = 2.0  # times the allowed false alarms and misses, on a source that the weights were fitted without
UNSEEN_SHARE = 0.8  # of a fit: nearly every picture that is brought comes from a camera that nobody trained on
MISSES = 0.10  # share of the fakes that may be called real
SMALL = 20  # real pictures that a source needs for a threshold of its own
DISAGREEMENT = 0.6  # spread that is named as the reason of a verdict that lies in the band


def logit(p: float) -> float:
    """log(p / (1 - p)), bounded."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


@dataclass(frozen=True)
class Calibration:
    """The fitted logistic and the decision rule; `calibration.json` in the adapter directory."""

    weights: dict[str, float]  # per part: `mllm` and the experts' names
    means: dict[str, float]  # mean logit of each part where it was fitted; stands in for a missing score
    bias: float
    low: float  # below: real
    high: float  # from here on: fake; between: inconclusive
    mllm_threshold: float = 0.5  # P(fake) of the MLLM alone at which mode="paper" says fake
    fitted_on: dict[str, Any] = field(default_factory=dict)  # n, groups, sources, rates promised
    disagreement: float | None = None  # spread of the parts above which there is no verdict; None: it decides nothing
    floors: dict[str, float] = field(default_factory=dict)  # logit of a one-sided part below which it says no more

    def probability(self, logits: Mapping[str, float | None]) -> float:
        """Calibrated P(fake) from raw logits; a part that is absent or None is taken at its mean."""
        total = self.bias
        for name, weight in self.weights.items():
            value = logits.get(name)
            total += weight * (0.0 if value is None else self._counted(name, value) - self.means[name])
        return 1 / (1 + math.exp(-total))

    def verdict(self, p_fake: float, logits: Mapping[str, float | None]) -> Verdict:
        """Fake, real, or inconclusive with the reason."""
        spread = self.spread(logits)
        if self.low <= p_fake < self.high:
            return Verdict("inconclusive", p_fake, "experts_disagree" if spread > DISAGREEMENT else "in_band")
        if self.disagreement is not None and spread > self.disagreement:
            return Verdict("inconclusive", p_fake, "experts_disagree")
        return Verdict("fake" if p_fake >= self.high else "real", p_fake)

    def spread(self, logits: Mapping[str, float | None]) -> float:
        """The largest difference between what parts with a weight say by themselves, 0..1; 0 where fewer than two do.

        Each part's own P(fake) is read against its mean: which side of its usual answer it is on. A one-sided part at
        its floor says nothing, so it contradicts nobody.
        """
        said = [
            1 / (1 + math.exp(-(self._counted(name, value) - self.means[name])))
            for name, value in logits.items()
            if value is not None and self.weights.get(name, 0) > 0 and value > self.floors.get(name, -math.inf)
        ]
        return max(said) - min(said) if said else 0.0

    def _counted(self, name: str, value: float) -> float:
        return max(_bounded(value), self.floors.get(name, -_CLIP))

    @property
    def sha256(self) -> str:
        """Of everything in it; a refitted one has another."""
        return json_sha256(asdict(self))

    def save(self, folder: Path) -> None:
        write_text(folder / "calibration.json", json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """Raises SetupError when the file is absent, incomplete or contradicts itself."""
        path = folder / "calibration.json"
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            numbers = [
                found.bias,
                found.low,
                found.high,
                *(x for k, w in found.weights.items() for x in (w, found.means[k])),
                *found.floors.values(),
            ]
            if not all(math.isfinite(x) for x in numbers) or found.low > found.high:
                raise ValueError("a number is not finite, or the band is upside down")
            if found.disagreement is not None and not 0 < found.disagreement < 1:
                raise ValueError("the disagreement is no number between 0 and 1")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SetupError(f"{path} cannot be read: {error}. Make it: python -m finetune.calibrate") from error
        return found


def _bounded(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no logit: a score that is missing is None")
    return max(-_CLIP, min(_CLIP, value))


def fit_weights(
    parts: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.float64],
    sample_weights: NDArray[np.float64],
    ridge: float = 0.02,
    floors: Mapping[str, float] | None = None,
) -> tuple[dict[str, float], dict[str, float], float]:
    """Weights, means and bias of the logistic. `parts`: name -> logits [n], NaN where a score is missing.

    Non-negative weights: an expert whose score counts against itself has learnt the calibration split, not forgeries.
    Projected Newton steps on the ridge-penalised log-likelihood; `sample_weights` balance labels and sources. `floors`:
    as in `Calibration`; means are those of the floored logits.
    """
    names = list(parts)
    parts = {n: np.maximum(v, (floors or {}).get(n, -_CLIP)) for n, v in parts.items()}
    w = sample_weights / sample_weights.sum()
    means = {n: _mean(np.clip(parts[n], -_CLIP, _CLIP), w) for n in names}
    x = np.stack([np.nan_to_num(np.clip(parts[n], -_CLIP, _CLIP) - means[n], nan=0.0) for n in names], 1)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    beta = np.zeros(x.shape[1])
    penalty = np.array([ridge] * len(names) + [0.0])
    active = np.ones(x.shape[1], bool)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ beta))
        gradient = x.T @ (w * (p - labels)) + penalty * beta
        # A weight at zero stays there while the gradient would make it negative.
        active[:-1] = (beta[:-1] > 0) | (gradient[:-1] < 0)
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x + np.diag(penalty + 1e-9)
        step = np.zeros_like(beta)
        step[active] = np.linalg.solve(hessian[np.ix_(active, active)], gradient[active])
        new = beta - step
        new[:-1] = np.maximum(new[:-1], 0)
        moved = float(np.abs(new - beta).max())
        beta = new
        if moved < 1e-8:
            break
    return {n: float(b) for n, b in zip(names, beta, strict=False)}, means, float(beta[-1])


def _mean(logits: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Weighted mean of the scores that there are; 0 where there are none (such a part gets no weight).

    Weighted as the fit is: where most of the pictures are fakes, a plain mean in place of a missing score accuses.
    """
    there = np.isfinite(logits)
    return float(np.average(logits[there], weights=weights[there])) if weights[there].sum() > 0 else 0.0


def fit_calibration(
    parts: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.float64],
    sources: Sequence[str],
    sample_weights: NDArray[np.float64],
    *,
    one_sided: Collection[str] = (),
    false_alarms: float = 0.05,
    unseen: Mapping[str, NDArray[np.float64]] | None = None,
) -> Calibration:
    """The logistic of `fit_weights`, and a band for the cameras that were there and for one that was not.

    `choose_band` sets it on the same pictures. Then `high` rises until of each source of real pictures at most UNSEEN
    times as many are called fake where the weights were fitted without that source, and `low` falls until of each
    source's fakes, a generator's too, at most UNSEEN times as many are called real. `one_sided`: the parts that get a
    floor. The band is chosen with the numbers that are stored: six decimals.

    `unseen`: the same pictures' logits where the parts that could be trained without each one's camera or generator
    were. They have UNSEEN_SHARE of the weight in the fit of weights, means and floors, and the bounds on a source left
    out are taken from what they say of it: such a part gets the weight that it has where it has not been before. One
    that was not trained without them keeps the advantage.
    """
    fitted = _fitted(parts, labels, sample_weights, one_sided, unseen)
    chances = np.array([fitted.probability(row) for row in rows_of(parts)])
    low, high = choose_band(chances, labels, sources, false_alarms=false_alarms)
    reals, fakes = (
        chances_of_sources_left_out(
            parts, labels, sources, sample_weights, one_sided=one_sided, unseen=unseen, fakes=fakes
        )
        for fakes in (False, True)
    )
    if reals:
        high = max(high, _bounding(reals, UNSEEN * false_alarms))
    if fakes:
        low = min(low, max(0.0, 1 - _bounding({s: 1 - p for s, p in fakes.items()}, UNSEEN * MISSES)))
    return replace(fitted, low=low, high=high)


def _fitted(
    parts: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.float64],
    sample_weights: NDArray[np.float64],
    one_sided: Collection[str],
    unseen: Mapping[str, NDArray[np.float64]] | None,
) -> Calibration:
    if unseen is not None:
        parts = {n: np.concatenate([v, unseen[n]]) for n, v in parts.items()}
        labels = np.tile(labels, 2)
        sample_weights = np.concatenate([(1 - UNSEEN_SHARE) * sample_weights, UNSEEN_SHARE * sample_weights])
    found = {n: choose_floor(parts[n], labels) for n in one_sided if n in parts}
    floors = _rounded({n: v for n, v in found.items() if v is not None})
    weights, means, bias = fit_weights(parts, labels, sample_weights, floors=floors)
    return Calibration(_rounded(weights), _rounded(means), round(bias, 6), 0.5, 0.5, floors=floors)


def chances_of_sources_left_out(
    parts: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.float64],
    sources: Sequence[str],
    sample_weights: NDArray[np.float64],
    *,
    one_sided: Collection[str] = (),
    unseen: Mapping[str, NDArray[np.float64]] | None = None,
    fakes: bool = False,
) -> dict[str, NDArray[np.float64]]:
    """P(fake) of each source's real pictures, or `fakes`, where weights, means and floors were fitted without it.

    The experts and the MLLM may have learnt from the source all the same, but for those that `unseen` has without: it
    is the calibration alone that has not seen it. A source without which a label is lacking is left out.
    """
    names, told = np.array(sources), {}
    for source in sorted(set(names[labels == fakes])):
        rest, own = names != source, (names == source) & (labels == fakes)
        if len(set(labels[rest])) < 2:
            continue
        weights = sample_weights[rest].copy()
        for label in (0, 1):  # reals and fakes weigh a half each, as before
            weights[labels[rest] == label] /= 2 * weights[labels[rest] == label].sum()
        others = None if unseen is None else {n: v[rest] for n, v in unseen.items()}
        fitted = _fitted({n: v[rest] for n, v in parts.items()}, labels[rest], weights, one_sided, others)
        met = rows_of({n: v[own] for n, v in (parts if unseen is None else unseen).items()})
        told[str(source)] = np.array([fitted.probability(row) for row in met])
    return told


def rows_of(parts: Mapping[str, NDArray[np.float64]]) -> list[dict[str, float | None]]:
    """The logits of each picture, by part; None where the array has NaN: no score."""
    columns = {n: v.tolist() for n, v in parts.items()}
    n = len(next(iter(columns.values()), ()))
    return [{name: None if math.isnan(v[k]) else v[k] for name, v in columns.items()} for k in range(n)]


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 6) for k, v in values.items()}


def choose_floor(logits: NDArray[np.float64], labels: NDArray[np.float64]) -> float | None:
    """The floor of a one-sided part: what FLOOR_SHARE of the real pictures stay below. None where it judged none."""
    reals = logits[(labels == 0) & np.isfinite(logits)]
    return float(np.clip(np.quantile(reals, FLOOR_SHARE), -_CLIP, _CLIP)) if len(reals) else None


def choose_band(
    p_fake: NDArray[np.float64],
    labels: NDArray[np.float64],
    sources: Sequence[str],
    *,
    false_alarms: float = 0.05,
    misses: float = MISSES,
) -> tuple[float, float]:
    """(low, high): at most `false_alarms` of each real source at or above `high`; `misses` of the fakes below `low`.

    The worst real source sets `high`, which is never below 0.5. Sources with fewer than SMALL real pictures count
    together as one, or with all real pictures where they still are too few. `low` never lies above `high`, nor above
    0.5.
    """
    names = np.array(sources)
    reals = {str(s): p_fake[(labels == 0) & (names == s)] for s in sorted(set(names[labels == 0]))}
    high = max(_bounding(reals, false_alarms), 0.5)
    low = min(float(np.quantile(p_fake[labels == 1], misses, method="lower")), 0.5, high)
    return low, high


def _bounding(reals: Mapping[str, NDArray[np.float64]], false_alarms: float) -> float:
    """Smallest threshold that at most `false_alarms` of each source's scores reach."""
    highs = [_quantile_above(scores, false_alarms) for scores in reals.values() if len(scores) >= SMALL]
    small = [scores for scores in reals.values() if len(scores) < SMALL]
    if small:
        together = np.concatenate(small)
        every = together if len(together) >= SMALL else np.concatenate(list(reals.values()))
        highs.append(_quantile_above(every, false_alarms))
    return max(highs)


def _quantile_above(scores: NDArray[np.float64], share: float) -> float:
    """Smallest threshold that at most `share` of the scores reach."""
    ordered = np.sort(scores)[::-1]
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)]) + 1e-6

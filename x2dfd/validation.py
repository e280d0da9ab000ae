"""The results of a model's validation run: its error rates, and likelihood ratios by score.

`validation.json` is in the adapter's folder; `python -m eval.validation` makes it from a run of `run_bench.py`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path

from x2dfd.errors import SetupError
from x2dfd.files import Json, bad_rate, checked, json_sha256, parse_json, write_text

FILE = "validation.json"
MODEL_FACTS = ("adapter_sha256", "experts", "band", "prompt_sha256")
"""What identifies a model: facts of `ModelInfo` that a run's model and the model at hand must share."""
PROPOSITIONS = (
    "H1: the most suspicious face in the picture was forged, in one of the ways that the validation run holds.",
    "H2: every face in the picture is as a camera took it, in a picture like the real ones of the validation run.",
)


@dataclass(frozen=True)
class Validation:
    """Error rates of one run over labelled pictures, and its likelihood ratios in steps."""

    run: str  # task and manifest, for people
    manifest_sha256: str
    model: Json  # MODEL_FACTS of the model that was validated
    n_real: int
    n_fake: int
    n_groups: int
    methods: tuple[str, ...]  # kinds of forgery in it
    sources: tuple[str, ...]  # of its real pictures
    rates: Json  # false_alarms, misses, answered, auc: value, with n and interval where they have one
    cllr: float  # log-likelihood-ratio cost of p_fake in that run: 0 is perfect, 1 says nothing
    steps: tuple[tuple[float, float, float, float], ...]  # from this p_fake on: likelihood ratio, and its 95 % interval
    remark: str = ""  # a sentence for readers, such as what the model knew of these pictures

    def fits(self, facts: Json) -> bool:
        """Whether the run is of that model: the same weights, experts, band and prompts."""
        return all(facts.get(key) == value for key, value in self.model.items())

    def likelihood_ratio(self, p_fake: float) -> Json:
        """How many times as frequent a score like this one is under H1 as under H2, with interval and limits."""
        _, value, low, high = self.steps[max(bisect_right([s[0] for s in self.steps], p_fake) - 1, 0)]
        return {"value": value, "interval": [low, high], "limits": [self.steps[0][1], self.steps[-1][1]]}

    @property
    def sha256(self) -> str:
        """Hash of all fields, the steps included."""
        return json_sha256(asdict(self))

    def summary(self) -> Json:
        """The fields that a report repeats: all but the steps and the model."""
        facts = asdict(self)
        del facts["steps"], facts["model"]
        return facts | {"methods": list(self.methods), "sources": list(self.sources)}

    def save(self, folder: Path) -> None:
        write_text(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Validation | None:
        """None where the folder has none. Raises SetupError when the file is damaged."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            validation = checked(cls, parse_json(path.read_bytes()))
            validation._check()
        except (OSError, ValueError) as error:
            raise SetupError(
                f"{path} cannot be read: {error}. Make it: python -m eval.validation", code="validation_unreadable"
            ) from error
        return validation

    def _check(self) -> None:
        """Raises ValueError for numbers that no run gives."""
        scores, ratios = [s[0] for s in self.steps], [s[1] for s in self.steps]
        if not ratios or scores != sorted(scores) or ratios != sorted(ratios):
            raise ValueError("its likelihood ratios do not rise with the score")
        if not all(0 <= score <= 1 and 0 < low <= ratio <= high for score, ratio, low, high in self.steps):
            raise ValueError("a step holds no likelihood ratio with its interval")
        if min(self.n_real, self.n_fake, self.n_groups) < 1 or self.cllr < 0:
            raise ValueError("a count is below 1, or the cost is below 0")
        if scores[0] != 0:
            raise ValueError(f"its first likelihood ratio begins at a score of {scores[0]}, not 0")
        if missing := [key for key in MODEL_FACTS if key not in self.model]:
            raise ValueError(f"`model` does not say which {missing[0]} was validated")
        for name in ("false_alarms", "misses", "answered", "auc"):
            rate = self.rates.get(name)
            if not isinstance(rate, dict) or "value" not in rate:
                raise ValueError(f"`rates.{name}` has no `value`")
            if type(n := rate.get("n")) is not int or n < 1:
                raise ValueError(f"`rates.{name}.n` is not a number of pictures")
        if (key := bad_rate(self.rates, ("value", "interval"))) is not None:
            raise ValueError(f"`rates.{key}` is not from 0 to 1")

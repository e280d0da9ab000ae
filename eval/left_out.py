"""Task `left-out`: forge methods that nobody showed to the expert `consistency`, found by it and by the fusion.

Trainings of it with `--hold-out A,B` stand beside the shipped one, and beside one another of the same length that knew
what they did not, on the same pictures. For each of them the fusion is
fitted anew, the MLLM left out, on a calibration split without the same methods: no part that learns from forgeries in
part has met them. Beside it the fusion of the shipped one, fitted the same way on all of that split.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from eval.experts_bench import Panel, alarms_by, joined_rows
from eval.models import NoMLLM
from eval.scoring import Layout, Resampling, Row, Store, common_auc, say, score, sha256_of, value_of
from finetune.calibrate import balance, score_parts
from x2dfd.adapter import EMBEDDED, read_adapter_card
from x2dfd.calibration import MLLM, Calibration, fit_calibration, logit
from x2dfd.crops import CropSet, load_crops
from x2dfd.detector import Detector, versions
from x2dfd.errors import X2DFDError
from x2dfd.experts import Expert, Shared, load_expert, read_card
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.types import Card, Evidence, Face

EXPERT = "consistency"
SPLIT = "calib"
VIEW_SEED = 1  # as `finetune.calibrate` degrades half of the pictures
SEEN = "with all of these"
RULE = (
    "Every row is against all real pictures. A forgery by several methods counts where each of them was left out, "
    "under the first; where only some were, nowhere."
)

LAYOUT = Layout(texts=("reason", "error"), numbers=(), packed=("notes",))
"""Rows of the calibration split: the scores are of the views that a calibration is fitted on."""


@dataclass(frozen=True)
class Training:
    """Weights of `consistency` that were trained without some methods."""

    folder: Path
    card: Card
    held_out: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> Training:
        """Raises SetupError for a folder without its card, X2DFDError where that names nothing as left out."""
        card = read_card(folder / f"{EXPERT}.card.json")
        named = card.figures.get("held_out")
        if not named or not isinstance(named, list) or not all(isinstance(n, str) for n in named):
            raise X2DFDError(f"{folder.name}: its card names no method that it was trained without (--hold-out)")
        return cls(folder, card, frozenset(named))

    @property
    def length(self) -> str:
        """How long it was trained, as its card says; "" where it does not."""
        found = re.findall(r"\d+ steps of \d+", self.card.trained_on)
        return ", then ".join(found)

    def peer(self, others: Sequence[Training]) -> Training | None:
        """The first training after this one, in a circle, that was as long and knew all that this one did not."""
        at = others.index(self)
        as_long = (t for t in (*others[at + 1 :], *others[:at]) if self.length and t.length == self.length)
        return next((t for t in as_long if not t.held_out & self.held_out), None)

    @property
    def name(self) -> str:
        return f"without {', '.join(sorted(self.held_out))}"

    def unseen(self, sample: Sample) -> bool:
        """Whether it is a fake by methods all of which were left out."""
        return sample.label == "fake" and set(sample.method.split("+")) <= self.held_out


def read_trainings(folders: Sequence[str]) -> list[Training]:
    """Raises X2DFDError for a folder that is no such training, and for two that left out the same."""
    found = [Training.read(Path(folder)) for folder in folders]
    if not found or len({t.name for t in found}) < len(found):
        raise X2DFDError("--weights: one folder for each choice of methods that were left out, at least one")
    return found


class Renamed:
    """An expert under another name, so that two trainings of one expert can be scored side by side."""

    card: ClassVar[Card]

    def __init__(self, expert: Expert, name: str) -> None:
        self._expert = expert
        self.card = replace(expert.card, name=name)  # type: ignore[misc]
        self.one_sided = bool(getattr(expert, "one_sided", False))

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return [replace(said, expert=self.card.name) for said in self._expert.judge(faces, shared)]


@dataclass(frozen=True, eq=False)
class Compared:
    """The shipped experts, and each training of one of them."""

    shipped: Panel
    trained: dict[str, Expert]  # name of a training -> its expert, under that name
    trainings: list[Training]
    held_out: tuple[str, ...]  # methods that no calibration of the model is fitted on

    @classmethod
    def load(cls, model: str, trainings: Sequence[Training]) -> Compared:
        """`model`: "embedded" or an adapter directory: whose experts. Raises X2DFDError where it has none such."""
        folder = EMBEDDED if model == "embedded" else Path(model)
        names = [name for name in Calibration.load(folder).weights if name != MLLM]
        if EXPERT not in names:
            raise X2DFDError(f"{model}: its calibration does not know the expert {EXPERT!r}")
        trained = {t.name: Renamed(load_expert(EXPERT, t.folder), t.name) for t in trainings}
        return cls(Panel.load(model, names), dict(trained), list(trainings), read_adapter_card(folder).held_out)

    @property
    def panel(self) -> Panel:
        """All experts that are scored; nothing joins them."""
        return replace(self.shipped, experts=[*self.shipped.experts, *self.trained.values()], calibration=None)

    def experts(self, name: str | None) -> list[Expert]:
        """Those that a fusion joins: with a training of that name in the place of the shipped one, if any."""
        return [self.trained[name] if name and e.card.name == EXPERT else e for e in self.shipped.experts]


# ---------------------------------------------------------------- the calibration split


def score_calibration(compared: Compared, data: Path, out: Path) -> tuple[list[Sample], list[Row], Row]:
    """All samples of the manifest's calibration split, their rows, and what they are; kept and used again in `out`."""
    crops = load_crops(data)
    samples = [sample for sample in crops.samples if sample.split == SPLIT]
    names = [e.card.name for e in compared.panel.experts]
    sha256 = manifest_sha256(data)
    key = {"manifest": sha256, "split": SPLIT, "view_seed": VIEW_SEED, "views": "by id", "experts": names}
    store = Store(out, key, LAYOUT)
    place = {sample.id: i for i, sample in enumerate(crops.samples)}
    rows, origin = score(partial(_views, compared.panel, crops, place), samples, store)
    store.finish(samples, rows, origin, data.parent)
    about = {"manifest": data.name, "sha256": sha256, "split": SPLIT, "view_seed": VIEW_SEED, "n": len(samples)}
    return samples, rows, about


def _views(
    panel: Panel, crops: CropSet, place: dict[str, int], samples: Sequence[Sample]
) -> tuple[list[Row], list[Row]]:
    """A row a sample: what each expert says of the view that `finetune.calibrate` would show it."""
    facts: Row = {"name": "experts alone", "base": {"name": "none", "sha256": ""}, "in_prompt": [], "held_out": []}
    facts |= {
        "adapter_sha256": None,
        "score_form": "numbers",
        "experts": {e.card.name: e.card.sha256 for e in panel.experts},
    }
    detector = Detector(NoMLLM(0.0), panel.experts, None, facts, "paper")
    parts = score_parts(detector, crops, [place[s.id] for s in samples], VIEW_SEED, all_score=False)
    rows = []
    for k, sample in enumerate(samples):
        row: Row = {"id": sample.id, "sha256": sha256_of(sample.path), "reason": None, "error": None, "notes": {}}
        said = {name: float(parts[name][k]) for name in facts["experts"]}
        rows.append(row | {"experts": {n: None if np.isnan(v) else 1 / (1 + np.exp(-v)) for n, v in said.items()}})
    return rows, [{"model": panel.facts(), "versions": versions()}]


def fitted(
    experts: Sequence[Expert], samples: Sequence[Sample], rows: Sequence[Row], without: Collection[str]
) -> Calibration:
    """The experts' fusion on these rows, but for fakes with a method in `without`.

    As `finetune.calibrate` fits it without --unseen. Raises X2DFDError where a label is lacking then.
    """
    kept = [k for k, s in enumerate(samples) if s.label == "real" or not set(s.method.split("+")) & set(without)]
    of = [samples[k] for k in kept]
    labels = np.array([float(s.label == "fake") for s in of])
    if not 0 < labels.sum() < len(labels):
        raise X2DFDError(f"--calib: split {SPLIT!r} needs real pictures, and fakes of other methods than were left out")
    names = [e.card.name for e in experts]
    scores = {n: [rows[k]["experts"].get(n) for k in kept] for n in names}
    parts = {n: np.array([np.nan if v is None else logit(v) for v in of_name]) for n, of_name in scores.items()}
    one_sided = [e.card.name for e in experts if getattr(e, "one_sided", False)]
    calibration = fit_calibration(parts, labels, [s.source for s in of], balance(of), one_sided=one_sided)
    about = {"n_real": int((labels == 0).sum()), "n_fake": int(labels.sum()), "n_groups": len({s.group for s in of})}
    return replace(calibration, fitted_on=about | {"without": sorted(without)})


# ---------------------------------------------------------------- what is counted


def left_out_result(
    compared: Compared,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    calib_samples: Sequence[Sample],
    calib_rows: Sequence[Row],
    draw: Resampling,
) -> Row:
    """A row a left-out method: AUC of expert and fusion that knew it and that did not; false alarms of each fusion.

    "seen" is the shipped one, "seen, as long" a training as long as the one that did not see it, where there is one.
    """
    if shared := {s.group for s in samples} & {s.group for s in calib_samples}:
        raise X2DFDError(f"{len(shared)} groups are judged and calibrated on, such as {min(shared)!r}: split them")
    fusions: Row = {}
    joined: dict[str, list[Row]] = {}
    for training in (None, *compared.trainings):
        name = training.name if training else None
        without = {*compared.held_out, *(training.held_out if training else ())}
        experts = compared.experts(name)
        calibration = fitted(experts, calib_samples, calib_rows, without)
        panel = replace(compared.shipped, experts=experts, calibration=calibration)
        joined[name or SEEN] = joined_rows(panel, rows)
        fusions[name or SEEN] = _fusion(calibration, samples, joined[name or SEEN], draw)
    not_known = set(compared.shipped.held_out[f"expert:{EXPERT}"])
    found: list[Row] = []
    headline: Row = {}
    for training in compared.trainings:
        values = {
            "expert seen": [row["experts"].get(EXPERT) for row in rows],
            "expert unseen": [row["experts"].get(training.name) for row in rows],
            "fusion seen": [row["p_fake"] for row in joined[SEEN]],
            "fusion unseen": [row["p_fake"] for row in joined[training.name]],
        }
        if peer := training.peer(compared.trainings):
            values |= {
                "expert seen, as long": [row["experts"].get(peer.name) for row in rows],
                "fusion seen, as long": [row["p_fake"] for row in joined[peer.name]],
            }
        methods = {method: _methods(training, samples, values, method, draw) for method in sorted(training.held_out)}
        for method, part in methods.items():
            if not part["n_fake"]:
                say(f"{training.name}: no judged picture was forged by {method!r}")
        together = _methods(training, samples, values, None, draw)
        found.append(
            {
                "name": training.name,
                "held_out": sorted(training.held_out),
                "shipped_did_not_see": sorted(training.held_out & not_known),
                "version": training.card.version,
                "sha256": training.card.sha256,
                "trained_on": training.card.trained_on,
                "as_long": peer.name if peer else None,
                "checkpoint": training.card.figures.get("checkpoint"),
                "methods": methods,
                "together": together,
            }
        )
        for what, part in (*methods.items(), ("together", together)):
            headline |= {f"{training.name}: {what}, {c}.auc": v | {"n": part["n"]} for c, v in part["auc"].items()}
    headline |= {f"{name}: false_alarms": part["false_alarms"] for name, part in fusions.items()}
    others = {e.card.name: e.card.trained_on for e in compared.shipped.experts if e.card.name != EXPERT}
    return {"headline": headline, "left_out": {"rule": RULE, "trainings": found, "fusions": fusions, "others": others}}


def _methods(
    training: Training,
    samples: Sequence[Sample],
    values: dict[str, list[float | None]],
    method: str | None,
    draw: Resampling,
) -> Row:
    """AUC of every column on the left-out fakes of one method (None: of all) and all reals that every column scored."""
    fakes = [i for i, s in enumerate(samples) if training.unseen(s) and method in (None, value_of(s, "method"))]
    reals = [i for i, s in enumerate(samples) if s.label == "real"]
    kept = [i for i in (*reals, *fakes) if all(column[i] is not None for column in values.values())]
    measured = common_auc([samples[i] for i in kept], {c: [v[i] for i in kept] for c, v in values.items()}, draw)
    n_fake = sum(samples[i].label == "fake" for i in kept)
    counts = {"n_fake": n_fake, "n_real": len(kept) - n_fake, "unscored": len(reals) + len(fakes) - len(kept)}
    return counts | measured


def _fusion(calibration: Calibration, samples: Sequence[Sample], rows: Sequence[Row], draw: Resampling) -> Row:
    pairs = zip(samples, rows, strict=True)
    reals = [(s.group, row["said"] == "fake") for s, row in pairs if s.label == "real" and row["said"]]
    return {
        "calibration": asdict(calibration),
        "false_alarms": draw.rate([hit for _, hit in reals], [group for group, _ in reals]),
        "false_alarms_by_source": alarms_by(samples, rows, "source", draw),
    }

"""Task `experts`: the experts side by side: how well, how steady under changes, and how well placed.

Columns are the experts, their fusion (the model's calibration, the MLLM missing) and one single-feature baseline; with
`--with-mllm` the MLLM has a column too, and the fusion is the whole model's verdict.
Every number is of the largest face of a picture, for that is the one which a mask is of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from eval import stats
from eval.changes import CHANGES, FORMAT_SWAP, Change, changes_of
from eval.localisation import localisation, places, truth_on_crop
from eval.rows import Origin, SampleRow, Scores, say, score
from eval.scoring import (
    Part,
    Scored,
    common_auc,
    equalise,
    false_alarms_by,
    point_metrics,
    three_answers,
    unscored,
)
from eval.task import Made, Run, Task
from eval.tasks.detect import by_slice
from x2dfd.adapter import EMBEDDED, expert_hashes, read_adapter_card
from x2dfd.calibration import MLLM, Calibration, logit, logits_of
from x2dfd.degrade import CODEC
from x2dfd.detector import Detector, through_codec, versions
from x2dfd.errors import InputError, SetupError
from x2dfd.experts import BUILTIN, Expert, ask, load_expert
from x2dfd.faces import find_faces
from x2dfd.files import Json, file_sha256
from x2dfd.manifest import Sample
from x2dfd.media import load_picture
from x2dfd.types import Evidence, Face, Verdict

Pixels = NDArray[np.uint8]

BESIDE = ("mesonet",)
"""Scored beside ours where a user has its weights: the baseline of the literature."""

OF_MLLM = ("name", "base", "adapter_sha256", "prompt_sha256", "runs_on")
FUSION, SHARPNESS = "fusion", "baseline:sharpness"
SHARPNESS_IS = "minus the logarithm of the variance of the crop's Laplacian: the smoother, the likelier fake"
"""Direction and form were stated before anything was scored with it."""


def run(run: Run) -> Made:
    """`experts`, and `locate`, which is its maps alone."""
    options, samples, locate = run.options, run.samples, run.options.task == "locate"
    one, folder = options.choice.expert, options.choice.folder or EMBEDDED
    names = [one] if one else options.experts.split(",") if options.experts else None
    changes = {} if locate else dict(CHANGES) if options.changes is None else changes_of(options.changes)
    whole = run.open().detector if options.with_mllm else None
    panel = Panel.load(folder, names, whole)
    more: Part = {"experts": [e.card.name for e in panel.experts], "changes": {n: c.line for n, c in changes.items()}}
    more |= {"mllm": panel.facts()["mllm"]} if whole else {}
    store = run.store(**more)
    ask_all = partial(judge, panel, changes, equal=options.equalise, batch_size=options.batch_size)
    rows, origin = score(ask_all, samples, store, joined=True)
    join(panel, rows)
    if locate:
        placed = localisation(samples, rows)
        headline = {f"map:{n}.{what}": part[key] for n, part in placed["maps"].items()
                    for what, key in (("pixel_auc", "auc"), ("iou", "iou"))}  # fmt: skip
        measured: Part = {"skipped_without_mask": run.skipped, "headline": headline, "localisation": placed}
    else:
        measured = experts_result(panel, samples, rows, changes, options.by)
    stated = {"fusion": panel.fusion, "held_out": panel.held_out.get(FUSION, [])}
    return Made(store, rows, origin, measured, options.choice.label, stated=stated)


EXPERTS = Task("experts", "3", "image", "experts, their fusion, a baseline; changed pictures; maps", run)
LOCATE = Task(
    "locate",
    "2",
    "image",
    "where experts point against the forgery's mask: pixel AUC, IoU",
    run,
    lambda s: s.label == "fake" and s.mask is not None,
    "a known mask",
)


def load_experts(names: Sequence[str] | None, folder: Path | None = None) -> tuple[list[Expert], dict[str, str]]:
    """The named experts; else all of ours and `mesonet` that can be loaded, and the reasons of the others. `folder`:
    weights that go before an expert's own. Raises UnknownName, SetupError."""
    if names is not None:
        return [load_expert(name, folder) for name in names], {}
    found, reasons = [], {}
    for name in (*BUILTIN, *BESIDE):
        try:
            found.append(load_expert(name, folder))
        except SetupError as error:
            reasons[name] = str(error)
    if not found:
        raise SetupError("no expert can be loaded: " + "; ".join(reasons.values()), code="no_expert")
    return found, reasons


@dataclass(frozen=True, eq=False)
class Panel:
    """The experts that are scored side by side, and the calibration that joins them."""

    experts: list[Expert]
    left_out: tuple[str, ...]  # experts that could not be loaded
    calibration: Calibration | None  # None where it was fitted to other weights than are here
    fusion: Part  # what the result says of it
    held_out: dict[str, list[str]]  # column -> forge methods that its card names as held out; fusion: those held out of
    # the calibration and of every expert with a weight
    whole: Detector | None = None  # the model with its MLLM, whose own P(fake) joins the experts'

    @classmethod
    def load(cls, folder: Path, names: Sequence[str] | None, whole: Detector | None = None) -> Panel:
        """`folder`: the adapter directory whose calibration and whose experts' weights are taken.

        `whole`: the same model with its MLLM; without it the fusion is that of the experts. Raises X2DFDError for what
        is not an adapter directory, not an expert, or named and not to be had.
        """
        card, calibration = read_adapter_card(folder), Calibration.load(folder)
        experts, reasons = load_experts(names, folder / "experts")
        for reason in reasons.values():
            say(f"not scored: {reason}")
        held_out = {f"expert:{e.card.name}": _held_out(e.card.figures) for e in experts}
        wanted = expert_hashes(card, calibration)
        other = [e.card.name for e in experts if wanted.get(e.card.name, e.card.sha256) != e.card.sha256]
        weighty = [n for n, w in calibration.weights.items() if w > 0]
        here = {e.card.name for e in experts} | ({MLLM} if whole else set())
        fusion: Part = {"of": f"{card.name} {card.version}", "calibration": file_sha256(folder / "calibration.json")}
        if other or not here & set(weighty):
            lacking = f"calibrated with other weights of {', '.join(other)}" if other else "none of its experts is here"
            say(f"no fusion: {lacking}")
            return cls(experts, tuple(reasons), None, fusion | {"left_out": lacking}, held_out, whole)
        fusion |= {
            "weights": calibration.weights,
            "missing": [n for n in weighty if n not in here],
            "real_below": calibration.low,
            "fake_from": calibration.high,
        }
        joined = [e for e in experts if e.card.name in weighty]
        by_all = [m for m in card.held_out if all(_not_learnt(m, e.card.figures) for e in joined)]
        of_mllm = {MLLM: list(card.held_out)} if whole else {}
        return cls(experts, tuple(reasons), calibration, fusion, {FUSION: by_all} | of_mllm | held_out, whole)

    @property
    def columns(self) -> list[str]:
        joined = [FUSION] if self.calibration else []
        joined += [MLLM] if self.whole else []
        return [*joined, *(f"expert:{e.card.name}" for e in self.experts), SHARPNESS]

    def facts(self) -> Part:
        """What the scores come from; the fusion is made of them and stands apart."""
        return {
            "experts": {e.card.name: f"{e.card.version} {e.card.sha256}" for e in self.experts},
            "experts_left_out": list(self.left_out),
            "crops_through": f"{CODEC[0]} {CODEC[1]}",
            **({MLLM: {k: getattr(self.whole.info, k) for k in OF_MLLM}} if self.whole else {}),
            SHARPNESS: SHARPNESS_IS,
        }

    def value(self, column: str, scores: Scores | None) -> float | None:
        """A column's value, from the scores of one look at a picture."""
        if scores is None:
            return None
        if column == FUSION:
            answer = self.joined(scores)
            return answer.p_fake if answer else None
        return scores.get(column.removeprefix("expert:"))

    def joined(self, scores: Scores) -> Verdict | None:
        """The answer of the experts together; None where none of those that weigh has a score."""
        known = self.known(scores)
        if self.calibration is None or not any(self.calibration.weights.get(name, 0) > 0 for name in known):
            return None
        own = known.pop(MLLM, None)
        covers = {e.card.name: e.card.covers for e in self.experts}
        evidence = [Evidence(name, score) for name, score in known.items()]
        logits = logits_of(None if own is None else logit(own), evidence, covers)
        return self.calibration.verdict(self.calibration.probability(logits))

    def known(self, scores: Scores) -> dict[str, float]:
        """The scores that are there, of the experts and of the MLLM."""
        names = (MLLM, *(e.card.name for e in self.experts))
        return {n: score for n in names if (score := scores.get(n)) is not None}


def _held_out(figures: Part) -> list[str]:
    """The methods that a card names as held out of training."""
    named = figures.get("held_out", ())
    return sorted(named) if isinstance(named, list | tuple) and all(isinstance(n, str) for n in named) else []


def _not_learnt(method: str, figures: Part) -> bool:
    """Whether a card names a method as held out, or lists what was learnt and not this method."""
    learnt = figures.get("learnt")
    return method in _held_out(figures) or (isinstance(learnt, list) and method not in learnt)


def judge(
    panel: Panel, changes: Mapping[str, Change], samples: Sequence[Sample], *, equal: bool, batch_size: int
) -> tuple[list[SampleRow], list[Origin]]:
    """A row a sample, and where they come from. A file that cannot be read is a row with its reason."""
    rows, views = [], []
    for sample in samples:
        row, seen = _views_of(sample, changes, equal)
        rows.append(row)
        views.append(seen)
    found = [face for seen in views for face, *_ in seen.values() if face]
    faces = through_codec(found)
    scores: list[Scores] = [{SHARPNESS: sharpness(face.crop)} for face in faces]
    notes: list[dict[str, str]] = [{} for _ in faces]
    maps: list[Json] = [{} for _ in faces]
    if panel.whole:
        for at in range(0, len(found), batch_size):
            own, _ = panel.whole.judge_faces(found[at : at + batch_size])
            for place, value in enumerate((1 / (1 + np.exp(-own))).tolist(), start=at):
                scores[place][MLLM] = value
    for expert in panel.experts:
        for at in range(0, len(faces), batch_size):
            for place, said in enumerate(ask(expert, faces[at : at + batch_size]), start=at):
                scores[place][expert.card.name] = said.score
                if said.score is None:
                    notes[place][expert.card.name] = said.note or "no score"
                if said.map:
                    maps[place][expert.card.name] = said.map
    told = iter(zip(faces, scores, notes, maps, strict=True))
    for row, seen in zip(rows, views, strict=True):
        for name, (face, truth) in seen.items():
            of_face = next(told) if face else None
            if name:
                row.changed[name] = of_face[1] if of_face else None
            elif of_face:
                row.experts, row.notes = of_face[1], row.notes | of_face[2]
                if truth is not None:
                    row.places = places(of_face[3], of_face[0], truth)
    return rows, [{"model": panel.facts(), "versions": versions()}]


Views = dict[str, tuple[Face | None, NDArray[np.bool_] | None]]
"""Change ("" for none) -> the largest face, and where it is forged, on the crop's grid."""


def _views_of(sample: Sample, changes: Mapping[str, Change], equal: bool) -> tuple[SampleRow, Views]:
    row = SampleRow.of(sample)
    try:
        original: Pixels = load_picture(sample.path).pixels
        pixels = load_picture(equalise(original)).pixels if equal else original
        face = largest(pixels)
        changed: Views = {n: (largest(c(pixels, sample.id)), None) for n, c in changes.items()} if face else {}
    except InputError as error:
        return row.failed(error.code, error.reason), {}
    if face is None:
        row.reason = "no_face"
        return row, {}
    truth = None
    if sample.label == "fake" and sample.mask is not None:
        try:
            truth = truth_on_crop(sample.mask, original.shape, pixels, face)
        except InputError as error:
            row.notes["mask"] = f"mask: {error.code}"
    return row, {"": (face, truth)} | changed


def largest(pixels: Pixels) -> Face | None:
    """The largest face of a picture."""
    return next(iter(find_faces(pixels)), None)


def sharpness(crop: Pixels) -> float:
    """The single-feature baseline: the higher, the smoother the crop. No probability."""
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    return -float(np.log(cv2.Laplacian(grey, cv2.CV_64F).var() + 1e-3))


def join(panel: Panel, rows: Sequence[SampleRow]) -> None:
    """Puts the fusion's answer into the rows: it is made of the stored scores, so a new calibration costs nothing."""
    for row in rows:
        verdict = panel.joined(row.experts)
        if verdict is None and panel.calibration and not row.error:
            # What could be opened and has no answer was not assessed, which is not "real".
            verdict = Verdict("inconclusive", None, row.reason or "no score")
        row.p_fake, row.said = (verdict.p_fake, verdict.label) if verdict else (None, None)
        row.reason = verdict.reason if verdict else row.reason


def experts_result(
    panel: Panel, samples: Sequence[Sample], rows: Sequence[SampleRow], changes: Mapping[str, Change], by: Sequence[str]
) -> Part:
    """Metrics of every column, overall and in slices; robustness; the format swap; localisation. The rows hold the
    fusion's answer (`join`)."""
    columns = {c: [panel.value(c, row.experts) for row in rows] for c in panel.columns}
    scorers: Part = {}
    for column, values in columns.items():
        of = Scored.of(samples, values)
        part: Part = {"n_scored": len(of.at), "unscored": unscored(rows, values, column)}
        # Of a score that is no probability there is no calibration to measure.
        part["overall"] = of.counts() | point_metrics(of, probability=column != SHARPNESS)
        said = [str(rows[i].said) for i in of.at] if column == FUSION else None
        part["by"] = {c: by_slice(of, said, c) for c in by}
        if column == FUSION:
            part["answers"] = three_answers(samples, rows)
            part["answers"]["false_alarms_by"] = {c: false_alarms_by(samples, rows, c) for c in by}
        scorers[column] = part
    headline = {f"{c}.auc": s["overall"]["auc"] for c, s in scorers.items()}
    if FUSION in scorers:
        headline[f"{FUSION}.false_alarms"] = scorers[FUSION]["answers"]["false_alarms"]
    steady = {name: _changed(panel, samples, rows, change) for name, change in changes.items()}
    headline |= {f"{name}.{FUSION}.auc": part["auc"][FUSION] for name, part in steady.items() if FUSION in part["auc"]}
    placed = localisation(samples, rows)
    headline |= {f"map:{n}.pixel_auc": s["auc"] for n, s in placed["maps"].items()}
    return {
        "headline": headline,
        "scorers": scorers,
        "common": common_auc(samples, columns),
        "held_out": panel.held_out,
        "robustness": steady,
        "format_swap": _swap(panel, rows) if FORMAT_SWAP in changes else None,
        "localisation": placed,
    }


def _changed(panel: Panel, samples: Sequence[Sample], rows: Sequence[SampleRow], change: Change) -> Part:
    """A change's AUC and answers, beside those of the same pictures unchanged; and how many faces it cost."""
    name = change.name
    looked = [i for i, row in enumerate(rows) if name in row.changed]
    after = {i: scores for i in looked if (scores := rows[i].changed[name])}
    lost = {label: sum(samples[i].label == label and i not in after for i in looked) for label in ("real", "fake")}
    result: Part = {"what": change.line, "had_face": len(looked), "lost_face": lost, "auc": {}}
    result["unchanged"] = {}
    for column in panel.columns:
        pairs = {i: (panel.value(column, rows[i].experts), panel.value(column, scores)) for i, scores in after.items()}
        kept = {i: pair for i, pair in pairs.items() if None not in pair}
        own = [samples[i] for i in kept]
        result["auc"][column] = Scored.of(own, [later for _, later in kept.values()]).auc()
        result["unchanged"][column] = Scored.of(own, [before for before, _ in kept.values()]).auc().value
    if panel.calibration:
        answers = {i: panel.joined(scores) for i, scores in after.items()}
        for what, label, wrong in (("false_alarms", "real", "fake"), ("misses", "fake", "real")):
            mine = {i: a is not None and a.label == wrong for i, a in answers.items() if samples[i].label == label}
            result[what] = stats.rate(list(mine.values()), [samples[i].group for i in mine])
            result["unchanged"][what] = float(np.mean([rows[i].said == wrong for i in mine])) if mine else None
    return result


def _swap(panel: Panel, rows: Sequence[SampleRow]) -> Part:
    """How far P(fake) moves between a PNG and a JPEG of the same pixels."""
    result: Part = {}
    for column in panel.columns[:-1]:  # the last one is no probability
        pairs = [(panel.value(column, r.experts), panel.value(column, r.changed.get(FORMAT_SWAP))) for r in rows]
        moved = [abs(after - before) for before, after in pairs if before is not None and after is not None]
        median, p90 = (float(np.quantile(moved, q)) if moved else None for q in (0.5, 0.9))
        result[column] = {"median": median, "p90": p90, "n": len(moved)}
    return result

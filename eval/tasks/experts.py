"""Task `experts`: scores the experts side by side, also under changes, and measures where their maps point.

Columns are the experts, their fusion (the model's calibration, the MLLM missing) and one single-feature baseline; with
`--with-mllm` the MLLM has a column too, and the fusion is the whole model's verdict.
Every number is of a picture's largest face, because masks are of that one.
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
from eval.task import Outcome, Run, Task
from eval.tasks.detect import by_slice
from x2dfd.adapter import EMBEDDED, expert_hashes, read_adapter_card
from x2dfd.calibration import Calibration, logit, logits_of, sigmoid
from x2dfd.detector import Detector, through_codec, versions
from x2dfd.errors import InputError, SetupError
from x2dfd.experts import BUILTIN, Expert, ask, load_expert
from x2dfd.faces import find_faces
from x2dfd.files import Json, file_sha256
from x2dfd.loading import crops_through
from x2dfd.manifest import Sample
from x2dfd.media import load_picture
from x2dfd.types import MLLM, Evidence, Face, Verdict

Pixels = NDArray[np.uint8]

FOREIGN = ("mesonet",)
"""Scored as well if the user has its weights: the baseline of the literature."""

OF_MLLM = ("name", "base", "adapter_sha256", "prompt_sha256", "runs_on")
FUSION, SHARPNESS = "fusion", "baseline:sharpness"
SHARPNESS_IS = "minus the logarithm of the variance of the crop's Laplacian: the smoother, the likelier fake"
"""Its direction and form were fixed before anything was scored with it."""


def run(run: Run) -> Outcome:
    """`experts`, and `locate`, which is its maps alone."""
    options, samples, locate = run.options, run.samples, run.options.task == "locate"
    expert, folder = options.choice.expert, options.choice.folder or EMBEDDED
    names = [expert] if expert else options.experts.split(",") if options.experts else None
    changes = {} if locate else dict(CHANGES) if options.changes is None else changes_of(options.changes)
    whole = run.open().detector if options.with_mllm else None
    panel = Panel.load(folder, names, whole)
    extra: Part = {"experts": [e.card.name for e in panel.experts], "changes": {n: c.line for n, c in changes.items()}}
    extra |= {"mllm": panel.facts()["mllm"]} if whole else {}
    store = run.store(**extra)
    ask_all = partial(judge, panel, changes, equal=options.equalise, batch_size=options.batch_size)
    rows, origin = score(ask_all, samples, store, joined=True)
    join(panel, rows)
    if locate:
        maps = localisation(samples, rows)
        headline = {f"map:{n}.{what}": part[key] for n, part in maps["maps"].items()
                    for what, key in (("pixel_auc", "auc"), ("iou", "iou"))}  # fmt: skip
        measured: Part = {"skipped_without_mask": run.skipped, "headline": headline, "localisation": maps}
    else:
        measured = experts_result(panel, samples, rows, changes, options.by)
    stated = {"fusion": panel.fusion, "held_out": panel.held_out.get(FUSION, [])}
    return Outcome(store, rows, origin, measured, options.choice.label, stated=stated)


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
    """The named experts, by default all of ours and `mesonet`, and the reason for each that cannot be loaded. Weights
    in `folder` take precedence over an expert's own. Raises UnknownName, SetupError."""
    if names is not None:
        return [load_expert(name, folder) for name in names], {}
    experts, reasons = [], {}
    for name in (*BUILTIN, *FOREIGN):
        try:
            experts.append(load_expert(name, folder))
        except SetupError as error:
            reasons[name] = str(error)
    if not experts:
        raise SetupError("no expert can be loaded: " + "; ".join(reasons.values()), code="no_expert")
    return experts, reasons


@dataclass(frozen=True, eq=False)
class Panel:
    """The experts that are scored side by side, and the calibration that joins them."""

    experts: list[Expert]
    left_out: tuple[str, ...]  # experts that could not be loaded
    calibration: Calibration | None  # None where it was fitted to other weights than are here
    fusion: Part  # its description in the result
    held_out: dict[str, list[str]]  # column -> forge methods that its card names as held out; fusion: those held out of
    # the calibration and of every expert with a weight
    whole: Detector | None = None  # the model with its MLLM, whose own P(fake) joins the experts'

    @classmethod
    def load(cls, folder: Path, names: Sequence[str] | None, whole: Detector | None = None) -> Panel:
        """Loads the calibration and the experts' weights of the adapter directory `folder`.

        `whole`: the same model with its MLLM; without it the fusion is that of the experts. Raises X2DFDError if
        `folder` is no adapter directory, or a named expert is unknown or cannot be loaded.
        """
        card, calibration = read_adapter_card(folder), Calibration.load(folder)
        experts, reasons = load_experts(names, folder / "experts")
        for reason in reasons.values():
            say(f"not scored: {reason}")
        held_out = {f"expert:{e.card.name}": _held_out(e.card.figures) for e in experts}
        expected = expert_hashes(card, calibration)
        other = [e.card.name for e in experts if expected.get(e.card.name, e.card.sha256) != e.card.sha256]
        weighted = [n for n in calibration.weights if calibration.counts(n)]
        available = {e.card.name for e in experts} | ({MLLM} if whole else set())
        fusion: Part = {"of": f"{card.name} {card.version}", "calibration": file_sha256(folder / "calibration.json")}
        if other or not available & set(weighted):
            why = f"calibrated with other weights of {', '.join(other)}" if other else "none of its experts is here"
            say(f"no fusion: {why}")
            return cls(experts, tuple(reasons), None, fusion | {"left_out": why}, held_out, whole)
        fusion |= {
            "weights": calibration.weights,
            "missing": [n for n in weighted if n not in available],
            "real_below": calibration.low,
            "fake_from": calibration.high,
        }
        fused = [e for e in experts if e.card.name in weighted]
        of_fusion = [m for m in card.held_out if all(_is_new(m, e.card.figures) for e in fused)]
        of_mllm = {MLLM: list(card.held_out)} if whole else {}
        return cls(experts, tuple(reasons), calibration, fusion, {FUSION: of_fusion} | of_mllm | held_out, whole)

    @property
    def columns(self) -> list[str]:
        columns = [FUSION] if self.calibration else []
        columns += [MLLM] if self.whole else []
        return [*columns, *(f"expert:{e.card.name}" for e in self.experts), SHARPNESS]

    def facts(self) -> Part:
        """Where the scores come from. The fusion is computed from them, and is described in `fusion`."""
        return {
            "experts": {e.card.name: f"{e.card.version} {e.card.sha256}" for e in self.experts},
            "experts_left_out": list(self.left_out),
            "crops_through": crops_through([e.card.name for e in self.experts]),
            **({MLLM: {k: getattr(self.whole.info, k) for k in OF_MLLM}} if self.whole else {}),
            SHARPNESS: SHARPNESS_IS,
        }

    def value(self, column: str, scores: Scores | None) -> float | None:
        """A column's value, from the scores of one version of a picture."""
        if scores is None:
            return None
        if column == FUSION:
            answer = self.joined(scores)
            return answer.p_fake if answer else None
        return scores.get(column.removeprefix("expert:"))

    def joined(self, scores: Scores) -> Verdict | None:
        """The verdict of the experts together; None where no expert with a weight has a score."""
        names = (MLLM, *(e.card.name for e in self.experts))
        available = {n: score for n in names if (score := scores.get(n)) is not None}
        if self.calibration is None or not any(map(self.calibration.counts, available)):
            return None
        p_mllm = available.pop(MLLM, None)
        covers = {e.card.name: e.card.covers for e in self.experts}
        evidence = [Evidence(name, score) for name, score in available.items()]
        logits = logits_of(None if p_mllm is None else logit(p_mllm), evidence, covers)
        return self.calibration.verdict(self.calibration.probability(logits))


def _held_out(figures: Part) -> list[str]:
    """The methods that a card names as held out of training."""
    named = figures.get("held_out", ())
    return sorted(named) if isinstance(named, list | tuple) and all(isinstance(n, str) for n in named) else []


def _is_new(method: str, figures: Part) -> bool:
    """Whether a card names a method as held out, or lists the methods of its training without it."""
    trained = figures.get("learnt")
    return method in _held_out(figures) or (isinstance(trained, list) and method not in trained)


def judge(
    panel: Panel, changes: Mapping[str, Change], samples: Sequence[Sample], *, equal: bool, batch_size: int
) -> tuple[list[SampleRow], list[Origin]]:
    """A row for each sample, and their origin. The row of an unreadable file holds the reason."""
    rows, views = [], []
    for sample in samples:
        row, view = _views_of(sample, changes, equal)
        rows.append(row)
        views.append(view)
    originals = [face for view in views for face, *_ in view.values() if face]
    faces = through_codec(originals)
    scores: list[Scores] = [{SHARPNESS: sharpness(face.crop)} for face in faces]
    notes: list[dict[str, str]] = [{} for _ in faces]
    maps: list[Json] = [{} for _ in faces]
    if panel.whole:
        for at in range(0, len(originals), batch_size):
            logits, _ = panel.whole.judge_faces(originals[at : at + batch_size])
            for index, value in enumerate(sigmoid(logits).tolist(), start=at):
                scores[index][MLLM] = value
    for expert in panel.experts:
        for at in range(0, len(faces), batch_size):
            for index, evidence in enumerate(ask(expert, faces[at : at + batch_size]), start=at):
                scores[index][expert.card.name] = evidence.score
                if evidence.score is None:
                    notes[index][expert.card.name] = evidence.note or "no score"
                if evidence.map:
                    maps[index][expert.card.name] = evidence.map
    results = iter(zip(faces, scores, notes, maps, strict=True))
    for row, view in zip(rows, views, strict=True):
        for name, (face, truth) in view.items():
            of_face = next(results) if face else None
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
    """Writes the fusion's verdict into the rows. It needs only stored scores, so a new calibration costs nothing."""
    for row in rows:
        verdict = panel.joined(row.experts)
        if verdict is None and panel.calibration and not row.error:
            # A picture that was opened but not scored must not count as "real".
            verdict = Verdict("inconclusive", None, row.reason or "no score")
        row.p_fake, row.said = (verdict.p_fake, verdict.label) if verdict else (None, None)
        row.reason = verdict.reason if verdict else row.reason


def experts_result(
    panel: Panel, samples: Sequence[Sample], rows: Sequence[SampleRow], changes: Mapping[str, Change], by: Sequence[str]
) -> Part:
    """Metrics of every column, overall and in slices; robustness; the format swap; localisation. The rows hold the
    fusion's verdict (`join`)."""
    columns = {c: [panel.value(c, row.experts) for row in rows] for c in panel.columns}
    scorers: Part = {}
    for column, values in columns.items():
        scored = Scored.of(samples, values)
        part: Part = {"n_scored": len(scored.at), "unscored": unscored(rows, values, column)}
        # A score that is no probability has no calibration to measure.
        part["overall"] = scored.counts() | point_metrics(scored, probability=column != SHARPNESS)
        answers = [str(rows[i].said) for i in scored.at] if column == FUSION else None
        part["by"] = {c: by_slice(scored, answers, c) for c in by}
        if column == FUSION:
            part["answers"] = three_answers(samples, rows)
            part["answers"]["false_alarms_by"] = {c: false_alarms_by(samples, rows, c) for c in by}
        scorers[column] = part
    headline = {f"{c}.auc": s["overall"]["auc"] for c, s in scorers.items()}
    if FUSION in scorers:
        headline[f"{FUSION}.false_alarms"] = scorers[FUSION]["answers"]["false_alarms"]
    robust = {name: _robustness(panel, samples, rows, change) for name, change in changes.items()}
    headline |= {f"{name}.{FUSION}.auc": part["auc"][FUSION] for name, part in robust.items() if FUSION in part["auc"]}
    maps = localisation(samples, rows)
    headline |= {f"map:{n}.pixel_auc": s["auc"] for n, s in maps["maps"].items()}
    return {
        "headline": headline,
        "scorers": scorers,
        "common": common_auc(samples, columns),
        "held_out": panel.held_out,
        "robustness": robust,
        "format_swap": _swap(panel, rows) if FORMAT_SWAP in changes else None,
        "localisation": maps,
    }


def _robustness(panel: Panel, samples: Sequence[Sample], rows: Sequence[SampleRow], change: Change) -> Part:
    """AUC and error rates under a change and on the same pictures unchanged, and how many faces were lost."""
    name = change.name
    tried = [i for i, row in enumerate(rows) if name in row.changed]
    changed = {i: scores for i in tried if (scores := rows[i].changed[name])}
    lost = {label: sum(samples[i].label == label and i not in changed for i in tried) for label in ("real", "fake")}
    result: Part = {"what": change.line, "had_face": len(tried), "lost_face": lost, "auc": {}}
    result["unchanged"] = {}
    for column in panel.columns:
        pairs = {i: (panel.value(column, rows[i].experts), panel.value(column, new)) for i, new in changed.items()}
        both = {i: pair for i, pair in pairs.items() if None not in pair}
        subset = [samples[i] for i in both]
        result["auc"][column] = Scored.of(subset, [after for _, after in both.values()]).auc()
        result["unchanged"][column] = Scored.of(subset, [before for before, _ in both.values()]).auc().value
    if panel.calibration:
        answers = {i: panel.joined(scores) for i, scores in changed.items()}
        for rate, label, wrong in (("false_alarms", "real", "fake"), ("misses", "fake", "real")):
            errors = {i: v is not None and v.label == wrong for i, v in answers.items() if samples[i].label == label}
            result[rate] = stats.rate(list(errors.values()), [samples[i].group for i in errors])
            result["unchanged"][rate] = float(np.mean([rows[i].said == wrong for i in errors])) if errors else None
    return result


def _swap(panel: Panel, rows: Sequence[SampleRow]) -> Part:
    """The differences of P(fake) between a PNG and a JPEG of the same pixels."""
    result: Part = {}
    for column in panel.columns[:-1]:  # the last one is no probability
        pairs = [(panel.value(column, r.experts), panel.value(column, r.changed.get(FORMAT_SWAP))) for r in rows]
        shifts = [abs(after - before) for before, after in pairs if before is not None and after is not None]
        median, p90 = (float(np.quantile(shifts, q)) if shifts else None for q in (0.5, 0.9))
        result[column] = {"median": median, "p90": p90, "n": len(shifts)}
    return result

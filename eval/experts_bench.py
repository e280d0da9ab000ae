"""Task `experts`: the experts side by side: how well, how steady under changes, and how well placed.

Columns are the experts, their fusion (the model's calibration, the MLLM missing) and one single-feature baseline; with
`--with-mllm` the MLLM has a column too, and the fusion is the whole model's verdict.
Every number is of the largest face of a picture, for that is the one which a mask is of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from eval import metrics as m
from eval.changes import FORMAT_SWAP, Change
from eval.localisation import localisation, places, truth_on_crop
from eval.scoring import (
    FOLDS,
    Layout,
    Resampling,
    Row,
    common_auc,
    equalise,
    folds,
    reason_of,
    say,
    sha256_of,
    slices,
    three_answers,
    value_of,
)
from finetune.calibrate import balance
from x2dfd.adapter import EMBEDDED, expert_hashes, read_adapter_card
from x2dfd.calibration import MLLM, Calibration, fit_calibration, logit
from x2dfd.degrade import CODEC
from x2dfd.detector import Detector, through_codec, versions
from x2dfd.errors import InputError, SetupError
from x2dfd.experts import BUILTIN, Expert, ask, load_expert
from x2dfd.faces import find_faces
from x2dfd.files import file_sha256
from x2dfd.manifest import Sample
from x2dfd.media import load_picture
from x2dfd.types import Face, Verdict

Pixels = NDArray[np.uint8]

BESIDE = ("mesonet",)
"""Scored beside ours where a user has its weights: the baseline of the literature."""

FUSION, SHARPNESS = "fusion", "baseline:sharpness"
SHARPNESS_IS = "minus the logarithm of the variance of the crop's Laplacian: the smoother, the likelier fake"
"""Direction and form were stated before anything was scored with it."""

LAYOUT = Layout(texts=("said", "reason", "error"), numbers=("p_fake",), packed=("notes", "changed", "places"))
"""`experts` holds the scores of the unchanged picture and the baseline; `changed`: change -> the same, null where no
face was found; `places`: map -> pixel AUC, and IoU at each threshold of eval.localisation."""


def load_experts(names: Sequence[str] | None, folder: Path | None = None) -> tuple[list[Expert], dict[str, str]]:
    """The named experts; else all of ours and `mesonet` that can be loaded, and the reasons of the others.

    `folder`: weights that go before an expert's own, as in `load_expert`. Raises UnknownName, SetupError.
    """
    if names is not None:
        return [load_expert(name, folder) for name in names], {}
    found, reasons = [], {}
    for name in (*BUILTIN, *BESIDE):
        try:
            found.append(load_expert(name, folder))
        except SetupError as error:
            reasons[name] = str(error)
    if not found:
        raise SetupError("no expert can be loaded: " + "; ".join(reasons.values()))
    return found, reasons


@dataclass(frozen=True, eq=False)
class Panel:
    """The experts that are scored side by side, and the calibration that joins them."""

    experts: list[Expert]
    left_out: tuple[str, ...]  # experts that could not be loaded
    calibration: Calibration | None  # None where it was fitted to other weights than are here
    fusion: Row  # what the result says of it
    held_out: dict[str, list[str]]  # column -> forge methods that its card names as left out of training; fusion: what
    # the calibration and every expert that weighs left out
    whole: Detector | None = None  # the model with its MLLM, whose own P(fake) joins the experts'

    @classmethod
    def load(cls, model: str, names: Sequence[str] | None, whole: Detector | None = None) -> Panel:
        """`model`: "embedded" or an adapter directory: whose calibration, and whose experts' weights.

        `whole`: the same model with its MLLM; without it the fusion is that of the experts. Raises X2DFDError for what
        is not an adapter directory, not an expert, or named and not to be had.
        """
        folder = EMBEDDED if model == "embedded" else Path(model)
        card, calibration = read_adapter_card(folder), Calibration.load(folder)
        experts, reasons = load_experts(names, folder / "experts")
        for reason in reasons.values():
            say(f"left out: {reason}")
        held_out = {f"expert:{e.card.name}": _held_out(e.card.figures) for e in experts}
        wanted = expert_hashes(card, calibration)
        other = [e.card.name for e in experts if wanted.get(e.card.name, e.card.sha256) != e.card.sha256]
        weighty = [n for n, w in calibration.weights.items() if w > 0]
        here = {e.card.name for e in experts} | ({MLLM} if whole else set())
        fusion: Row = {"of": f"{card.name} {card.version}", "calibration": file_sha256(folder / "calibration.json")}
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
        unseen = [m for m in card.held_out if all(_unseen(m, e.card.figures) for e in joined)]
        of_mllm = {MLLM: list(card.held_out)} if whole else {}
        return cls(experts, tuple(reasons), calibration, fusion, {FUSION: unseen} | of_mllm | held_out, whole)

    @property
    def columns(self) -> list[str]:
        joined = [FUSION] if self.calibration else []
        joined += [MLLM] if self.whole else []
        return [*joined, *(f"expert:{e.card.name}" for e in self.experts), SHARPNESS]

    def facts(self) -> Row:
        """What the scores come from; the fusion is made of them and stands apart."""
        return {
            "experts": {e.card.name: f"{e.card.version} {e.card.sha256}" for e in self.experts},
            "experts_left_out": list(self.left_out),
            "crops_through": f"{CODEC[0]} {CODEC[1]}",
            **(
                {MLLM: {k: self.whole.facts[k] for k in ("name", "base", "adapter_sha256", "prompt_sha256", "runs_on")}}
                if self.whole
                else {}
            ),
            SHARPNESS: SHARPNESS_IS,
        }

    def value(self, column: str, scores: Row | None) -> float | None:
        """A column's value, from the scores of one look at a picture."""
        if scores is None:
            return None
        if column == FUSION:
            answer = self.joined(scores)
            return answer.p_fake if answer else None
        return scores.get(column.removeprefix("expert:"))

    def joined(self, scores: Row) -> Verdict | None:
        """The answer of the experts together; None where none of those that weigh has a score."""
        known = self.known(scores)
        if self.calibration is None or not any(self.calibration.weights.get(name, 0) > 0 for name in known):
            return None
        return _answer(self.calibration, known)

    def known(self, scores: Row) -> dict[str, float]:
        """The scores that are there, of the experts and of the MLLM."""
        return {n: scores[n] for n in (MLLM, *(e.card.name for e in self.experts)) if scores.get(n) is not None}


def _held_out(figures: Row) -> list[str]:
    """The methods that a card names as left out of training."""
    named = figures.get("held_out", ())
    return sorted(named) if isinstance(named, list | tuple) and all(isinstance(n, str) for n in named) else []


def _unseen(method: str, figures: Row) -> bool:
    """Whether a card says that a method was left out, or lists what was learnt without it."""
    learnt = figures.get("learnt")
    return method in _held_out(figures) or (isinstance(learnt, list) and method not in learnt)


# ---------------------------------------------------------------- judging


def judge(
    panel: Panel, changes: Mapping[str, Change], samples: Sequence[Sample], *, equal: bool, batch_size: int
) -> tuple[list[Row], list[Row]]:
    """A row a sample, and where they come from. A file that cannot be read is a row with its reason."""
    rows, views = [], []
    for sample in samples:
        row, seen = _look(sample, changes, equal)
        rows.append(row)
        views.append(seen)
    found = [face for seen in views for face, *_ in seen.values() if face]
    faces = through_codec(found)
    scores: list[Row] = [{SHARPNESS: sharpness(face.crop)} for face in faces]
    notes: list[dict[str, str]] = [{} for _ in faces]
    maps: list[dict[str, Any]] = [{} for _ in faces]
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
                row["changed"][name] = of_face[1] if of_face else None
            elif of_face:
                row["experts"], row["notes"] = of_face[1], row["notes"] | of_face[2]
                if truth is not None:
                    row["places"] = places(of_face[3], of_face[0], truth)
    return rows, [{"model": panel.facts(), "versions": versions()}]


Views = dict[str, tuple[Face | None, NDArray[np.bool_] | None]]
"""Change ("" for none) -> the largest face, and where it is forged, on the crop's grid."""


def _look(sample: Sample, changes: Mapping[str, Change], equal: bool) -> tuple[Row, Views]:
    row: Row = {"id": sample.id, "sha256": sha256_of(sample.path), "reason": None, "error": None}
    row |= {"experts": {}, "notes": {}, "changed": {}, "places": {}}
    try:
        original: Pixels = load_picture(sample.path).pixels
        pixels = load_picture(equalise(original)).pixels if equal else original
    except InputError as error:
        return row | {"reason": error.code, "error": f"{error.reason} [{error.code}]"}, {}
    face = largest(pixels)
    if face is None:
        return row | {"reason": "no_face"}, {}
    truth = None
    if sample.label == "fake" and sample.mask is not None:
        try:
            truth = truth_on_crop(sample.mask, original.shape, pixels, face)
        except InputError as error:
            row["notes"]["mask"] = f"mask: {error.code}"
    return row, {"": (face, truth)} | {n: (largest(c(pixels, sample.id)), None) for n, c in changes.items()}


def largest(pixels: Pixels) -> Face | None:
    """The largest face of a picture."""
    return next(iter(find_faces(pixels)), None)


def sharpness(crop: Pixels) -> float:
    """The single-feature baseline: the higher, the smoother the crop. No probability."""
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    return -float(np.log(cv2.Laplacian(grey, cv2.CV_64F).var() + 1e-3))


# ---------------------------------------------------------------- what is counted


def joined_rows(panel: Panel, rows: Sequence[Row]) -> list[Row]:
    """The rows with the answer of the fusion: it is made of the stored scores, so a new calibration costs nothing."""
    out = []
    for row in rows:
        verdict = panel.joined(row["experts"])
        if verdict is None and panel.calibration and not row["error"]:
            # What could be opened and has no answer was not assessed, which is not "real".
            verdict = Verdict("inconclusive", None, row["reason"] or "no score")
        of_verdict = (verdict.p_fake, verdict.label, verdict.reason) if verdict else (None, None, row["reason"])
        out.append(row | dict(zip(("p_fake", "said", "reason"), of_verdict, strict=True)))
    return out


_CURVES: dict[str, m.Metric] = {
    "auc": m.auc,
    "average_precision": m.average_precision,
    "tpr_at_fpr_0.05": partial(m.tpr_at_fpr, fpr=0.05),
    "tpr_at_fpr_0.01": partial(m.tpr_at_fpr, fpr=0.01),
}


def experts_result(
    panel: Panel,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    changes: Mapping[str, Change],
    by: Sequence[str],
    draw: Resampling,
) -> Row:
    """Metrics of every column, overall and in slices; robustness; the format swap; localisation; missing experts.

    `rows` are those of `joined_rows`.
    """
    columns = {c: [panel.value(c, row["experts"]) for row in rows] for c in panel.columns}
    scorers: Row = {}
    for column, values in columns.items():
        missing = Counter(reason_of(r, column) for r, value in zip(rows, values, strict=True) if value is None)
        kept = [(i, value) for i, value in enumerate(values) if value is not None]
        of_kept = m.to_scores([value for _, value in kept])
        scorers[column] = {"n_scored": len(kept), "unscored": dict(sorted(missing.items()))}
        said = [rows[i]["said"] for i, _ in kept] if column == FUSION else None
        scorers[column] |= _measured([samples[i] for i, _ in kept], of_kept, said, column != SHARPNESS, by, draw)
        if column == FUSION:
            scorers[column]["answers"] = three_answers(samples, rows, draw)
            scorers[column]["answers"]["false_alarms_by"] = {c: alarms_by(samples, rows, c, draw) for c in by}
    headline = {f"{c}.auc": s["overall"]["auc"] | {"n": s["n_scored"]} for c, s in scorers.items()}
    if FUSION in scorers:
        headline[f"{FUSION}.false_alarms"] = scorers[FUSION]["answers"]["false_alarms"]
    steady = {name: _changed(panel, samples, rows, change, draw) for name, change in changes.items()}
    headline |= {f"{n}.{c}.auc": auc for n, part in steady.items() for c, auc in part["auc"].items() if c == FUSION}
    placed = localisation(samples, rows, draw)
    headline |= {f"map:{n}.pixel_auc": s["auc"] | {"n": placed["n"]} for n, s in placed["maps"].items()}
    return {
        "headline": headline,
        "scorers": scorers,
        "common": common_auc(samples, columns, draw),
        "held_out": panel.held_out,
        "robustness": steady,
        "format_swap": _swap(panel, rows) if FORMAT_SWAP in changes else None,
        "localisation": placed,
        "missing": missing_experts(panel, samples, rows, draw),
        "disagreement": disagreement(panel, samples, rows),
    }


def _measured(
    samples: Sequence[Sample],
    scores: m.Floats,
    said: Sequence[str] | None,
    probability: bool,
    by: Sequence[str],
    draw: Resampling,
) -> Row:
    labels, groups = m.to_labels(s.label for s in samples), [s.group for s in samples]
    # Of a score that is no probability there is no calibration to measure.
    wanted = _CURVES | ({"ece_15_even": m.ece_at_even_odds} if probability else {})

    def measured(chosen: Sequence[int]) -> Row:
        own = [groups[i] for i in chosen]
        return {name: draw.measure(fn, labels[chosen], scores[chosen], own) for name, fn in wanted.items()}

    overall: Row = {"n": len(samples), "n_real": int((labels == 0).sum()), "n_fake": int(labels.sum())}
    overall |= {"n_groups": len(set(groups))} | measured(range(len(samples)))
    result: Row = {"overall": overall, "by": {}}
    for column in by:
        table = result["by"][column] = {}
        for value, reals, fakes, against in slices(samples, column):
            part = {"against": against, "n_real": len(reals), "n_fake": len(fakes)} | measured(reals + fakes)
            for name, own, other in (("false_alarms", reals, "all reals"), ("found", fakes, "all fakes")):
                if said and against != other:
                    part[name] = draw.rate([said[i] == "fake" for i in own], [groups[i] for i in own])
            table[value] = part
    return result


def _changed(panel: Panel, samples: Sequence[Sample], rows: Sequence[Row], change: Change, draw: Resampling) -> Row:
    """A change's AUC and answers, beside those of the same pictures unchanged; and how many faces it cost."""
    name = change.name
    looked = [i for i, row in enumerate(rows) if name in row["changed"]]
    found = [i for i in looked if rows[i]["changed"][name]]
    lost = {label: sum(samples[i].label == label for i in looked) for label in ("real", "fake")}
    for i in found:
        lost[samples[i].label] -= 1
    result: Row = {"what": change.line, "had_face": len(looked), "lost_face": lost, "auc": {}}
    for column in panel.columns:
        kept, scores = [], []
        for i in found:
            before, after = panel.value(column, rows[i]["experts"]), panel.value(column, rows[i]["changed"][name])
            if before is not None and after is not None:
                kept.append(samples[i])
                scores.append((before, after))
        labels, both = m.to_labels(s.label for s in kept), m.to_scores(scores).reshape(-1, 2)
        auc = draw.measure(m.auc, labels, both[:, 1], [s.group for s in kept])
        result["auc"][column] = auc | {"unchanged": m.auc(labels, both[:, 0]), "n": len(kept)}
    if panel.calibration:
        for what, label, wrong in (("false_alarms", "real", "fake"), ("misses", "fake", "real")):
            own = [i for i in found if samples[i].label == label]
            groups = [samples[i].group for i in own]
            answers = [panel.joined(rows[i]["changed"][name]) for i in own]
            result[what] = draw.rate([a is not None and a.label == wrong for a in answers], groups)
            result[what]["unchanged"] = float(np.mean([rows[i]["said"] == wrong for i in own])) if own else None
    return result


def _swap(panel: Panel, rows: Sequence[Row]) -> Row:
    """How far P(fake) moves between a PNG and a JPEG of the same pixels."""
    result: Row = {}
    for column in panel.columns[:-1]:  # the last one is no probability
        moved = []
        for row in rows:
            before, after = panel.value(column, row["experts"]), panel.value(column, row["changed"].get(FORMAT_SWAP))
            if before is not None and after is not None:
                moved.append(abs(after - before))
        median, p90 = (float(np.quantile(moved, q)) if moved else None for q in (0.5, 0.9))
        result[column] = {"median": median, "p90": p90, "n": len(moved)}
    return result


def alarms_by(samples: Sequence[Sample], rows: Sequence[Row], column: str, draw: Resampling) -> Row:
    """For each value of a column: the share of its reals that were called fake. One without a face was not."""
    table: Row = {}
    reals = [i for i, s in enumerate(samples) if s.label == "real" and rows[i]["said"]]
    for value in sorted({value_of(samples[i], column) for i in reals} - {""}):
        own = [i for i in reals if value_of(samples[i], column) == value]
        table[value] = draw.rate([rows[i]["said"] == "fake" for i in own], [samples[i].group for i in own])
    return table


# ---------------------------------------------------------------- experts that are missing, or disagree

SPREADS = (0.5, 0.6, 0.7, 0.8, 0.9)


def missing_experts(panel: Panel, samples: Sequence[Sample], rows: Sequence[Row], draw: Resampling) -> Row | None:
    """The fusion with every choice of its experts, on the pictures that all of them could score.

    `imputed`: as shipped, what is missing standing at its mean; None where nothing that weighs is left. `refitted`:
    weights and band fitted anew to what is left, on the other groups of `FOLDS` parts: what a fit for each choice would
    gain.
    """
    calibration = panel.calibration
    if calibration is None:
        return None
    names = [MLLM] if panel.whole else []
    names += [e.card.name for e in panel.experts if e.card.name in calibration.weights]
    kept = [i for i, row in enumerate(rows) if all(row["experts"].get(n) is not None for n in names)]
    of, scored = [samples[i] for i in kept], [rows[i]["experts"] for i in kept]
    labels = m.to_labels(s.label for s in of)
    parts = {n: np.array([logit(scores[n]) for scores in scored]) for n in names}

    def measured(answers: Sequence[Verdict]) -> Row:
        groups, said = np.array([s.group for s in of]), np.array([a.label for a in answers])
        scores = m.to_scores([a.p_fake for a in answers if a.p_fake is not None])
        found: Row = {"auc": draw.measure(m.auc, labels, scores, groups.tolist())}
        for name, label in (("false_alarms", 0), ("found", 1)):
            own = labels == label
            found[name] = draw.rate((said[own] == "fake").tolist(), groups[own].tolist())
        return found | {"inconclusive": float((said == "inconclusive").mean())}

    patterns: Row = {}
    for here in (c for size in range(len(names), 0, -1) for c in combinations(names, size)):
        weighty = any(calibration.weights[n] > 0 for n in here)
        shipped = [_answer(calibration, {n: scores[n] for n in here}) for scores in scored]
        fitted = _refitted({n: parts[n] for n in here}, labels, of, calibration.floors)
        patterns["+".join(here)] = {
            "imputed": measured(shipped) if weighty and kept else None,
            "refitted": measured(fitted) if fitted else None,
        }
    return {"n": len(kept), "folds": FOLDS, "patterns": patterns}


def _answer(calibration: Calibration, scores: dict[str, float]) -> Verdict:
    logits = {name: logit(score) for name, score in scores.items()}
    return calibration.verdict(calibration.probability(logits), logits)


def _refitted(
    parts: dict[str, NDArray[np.float64]], labels: m.Labels, samples: Sequence[Sample], one_sided: Collection[str]
) -> list[Verdict] | None:
    """Each picture's answer by a calibration that was fitted without its group; None where one cannot be fitted."""
    part, y = folds([s.group for s in samples]), labels.astype(np.float64)
    sources = np.array([s.source for s in samples])
    answers: dict[int, Verdict] = {}
    for fold in sorted(set(part.tolist())):
        rest, own = np.flatnonzero(part != fold), np.flatnonzero(part == fold)
        if len(set(y[rest])) < 2:
            return None
        of_rest, even = {n: v[rest] for n, v in parts.items()}, balance([samples[int(i)] for i in rest])
        fitted = fit_calibration(of_rest, y[rest], sources[rest].tolist(), even, one_sided=one_sided)
        for i in own:
            chance = fitted.probability({n: float(v[i]) for n, v in parts.items()})
            answers[int(i)] = fitted.verdict(chance, {})
    return [answers[i] for i in range(len(samples))]


def disagreement(panel: Panel, samples: Sequence[Sample], rows: Sequence[Row]) -> Row | None:
    """What it would cost and save to answer nothing where the experts are further apart than each of SPREADS."""
    if panel.calibration is None:
        return None
    kept = [i for i, row in enumerate(rows) if row["p_fake"] is not None]
    labels = m.to_labels(samples[i].label for i in kept)
    table: Row = {}
    for at in (None, *SPREADS):
        calibration = replace(panel.calibration, disagreement=at)
        said = [_answer(calibration, panel.known(rows[i]["experts"])).label for i in kept]
        table["never" if at is None else str(at)] = m.selective(labels, said)
    return {"in_force": panel.calibration.disagreement, "from_spread": table}

"""Task `experts`: the experts without the MLLM, side by side: how well, how steady under changes, and how well placed.

Columns are the experts, their fusion (the model's calibration with the MLLM missing) and one single-feature baseline.
Every number is of the largest face of a picture, for that is the one which a mask is of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from eval import metrics as m
from eval.changes import CHANGES, FORMAT_SWAP
from eval.scoring import Layout, Resampling, Row, common_auc, equalise, reason_of, say, slices, three_answers, value_of
from x2dfd.adapter import EMBEDDED, read_adapter_card
from x2dfd.calibration import MLLM, Calibration, logit
from x2dfd.crops import MASK_SIZE, mask_on_crop
from x2dfd.detector import CODEC, through_codec, versions
from x2dfd.errors import InputError, SetupError, UnknownName, X2DFDError
from x2dfd.experts import BUILTIN, Expert, load_expert
from x2dfd.faces import CROP_SIZE, area_polygons, find_faces
from x2dfd.files import file_sha256
from x2dfd.manifest import Sample
from x2dfd.media import load_picture
from x2dfd.types import Face

Pixels = NDArray[np.uint8]

BESIDE = ("mesonet",)
"""Scored beside ours where a user has its weights: the baseline of the literature."""

FUSION, SHARPNESS = "fusion", "baseline:sharpness"
SHARPNESS_IS = "minus the logarithm of the variance of the crop's Laplacian: the smoother, the likelier fake"
"""Direction and form were stated before anything was scored with it."""

OVAL, CENTRE = "baseline:oval", "baseline:centre"
CENTRE_SIGMA = 0.25  # of the crop's side
MAP_THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))
STATED_THRESHOLD = 0.5

LAYOUT = Layout(texts=("said", "reason", "error"), numbers=("p_fake",), packed=("notes", "changed", "places"))
"""`experts` holds the scores of the unchanged picture and the baseline; `changed`: change -> the same, null where no
face was found; `places`: map -> pixel AUC, and IoU at each of MAP_THRESHOLDS."""


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
    held_out: dict[str, list[str]]  # column -> forge methods that its card names as left out of training

    @classmethod
    def load(cls, model: str, names: Sequence[str] | None) -> Panel:
        """`model`: "embedded" or an adapter directory: whose calibration, and whose experts' weights.

        Raises X2DFDError for what is not an adapter directory, not an expert, or named and not to be had.
        """
        folder = EMBEDDED if model == "embedded" else Path(model)
        card, calibration = read_adapter_card(folder), Calibration.load(folder)
        experts, reasons = load_experts(names, folder / "experts")
        for reason in reasons.values():
            say(f"left out: {reason}")
        held_out = {f"expert:{e.card.name}": _held_out(e.card.figures) for e in experts}
        other = [e.card.name for e in experts if card.experts.get(e.card.name, e.card.sha256) != e.card.sha256]
        weighty = [n for n, w in calibration.weights.items() if n != MLLM and w > 0]
        here = {e.card.name for e in experts}
        fusion: Row = {"of": f"{card.name} {card.version}", "calibration": file_sha256(folder / "calibration.json")}
        if other or not here & set(weighty):
            lacking = f"calibrated with other weights of {', '.join(other)}" if other else "none of its experts is here"
            say(f"no fusion: {lacking}")
            return cls(experts, tuple(reasons), None, fusion | {"left_out": lacking}, held_out)
        fusion |= {
            "weights": calibration.weights,
            "missing": [MLLM, *(n for n in weighty if n not in here)],
            "real_below": calibration.low,
            "fake_from": calibration.high,
        }
        return cls(experts, tuple(reasons), calibration, fusion, {FUSION: list(card.held_out)} | held_out)

    @property
    def columns(self) -> list[str]:
        joined = [FUSION] if self.calibration else []
        return [*joined, *(f"expert:{e.card.name}" for e in self.experts), SHARPNESS]

    def facts(self) -> Row:
        """What the scores come from; the fusion is made of them and stands apart."""
        return {
            "experts": {e.card.name: f"{e.card.version} {e.card.sha256}" for e in self.experts},
            "experts_left_out": list(self.left_out),
            "crops_through": f"{CODEC[0]} {CODEC[1]}",
            SHARPNESS: SHARPNESS_IS,
        }

    def value(self, column: str, scores: Row | None) -> float | None:
        """A column's value, from the scores of one look at a picture."""
        if scores is None:
            return None
        return self.joined(scores)[0] if column == FUSION else scores.get(column.removeprefix("expert:"))

    def joined(self, scores: Row) -> tuple[float | None, str | None]:
        """P(fake) and the answer of the experts together; None where none of those that weigh has a score."""
        if self.calibration is None:
            return None, None
        said = {e.card.name: scores.get(e.card.name) for e in self.experts}
        logits = {name: None if score is None else logit(score) for name, score in said.items()}
        if not any(value is not None and self.calibration.weights.get(n, 0) > 0 for n, value in logits.items()):
            return None, None
        verdict = self.calibration.verdict(self.calibration.probability(logits), logits)
        return verdict.p_fake, verdict.label


def _held_out(figures: Row) -> list[str]:
    """Methods, where a card names them: a list, or a table by method."""
    named = figures.get("held_out", ())
    return sorted(named) if isinstance(named, list | tuple | dict) and all(isinstance(n, str) for n in named) else []


# ---------------------------------------------------------------- judging


def judge(
    panel: Panel, changes: Sequence[str], samples: Sequence[Sample], *, equal: bool, batch_size: int
) -> tuple[list[Row], list[Row]]:
    """A row a sample, and where they come from. A file that cannot be read is a row with its reason."""
    rows, views = [], []
    for sample in samples:
        row, seen = _look(sample, changes, equal)
        rows.append(row)
        views.append(seen)
    faces = through_codec([face for seen in views for face, *_ in seen.values() if face])
    scores: list[Row] = [{SHARPNESS: sharpness(face.crop)} for face in faces]
    notes: list[dict[str, str]] = [{} for _ in faces]
    maps: list[dict[str, Any]] = [{} for _ in faces]
    for expert in panel.experts:
        for at in range(0, len(faces), batch_size):
            for place, said in enumerate(expert.judge(faces[at : at + batch_size]), start=at):
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


def _look(sample: Sample, changes: Sequence[str], equal: bool) -> tuple[Row, Views]:
    row: Row = {"id": sample.id, "p_fake": None, "said": None, "reason": None, "error": None}
    row |= {"experts": {}, "notes": {}, "changed": {}, "places": {}}
    try:
        original: Pixels = load_picture(sample.path).pixels
        pixels = load_picture(equalise(original)).pixels if equal else original
    except InputError as error:
        return row | {"reason": error.code, "error": f"{error.reason} [{error.code}]"}, {}
    face = _largest(pixels)
    if face is None:
        return row | {"reason": "no_face"}, {}
    truth = None
    if sample.label == "fake" and sample.mask is not None:
        try:
            truth = _truth(sample.mask, original.shape, pixels, face)
        except InputError as error:
            row["notes"]["mask"] = f"mask: {error.code}"
    return row, {"": (face, truth)} | {n: (_largest(CHANGES[n](pixels, sample.id)), None) for n in changes}


def _largest(pixels: Pixels) -> Face | None:
    return next(iter(find_faces(pixels)), None)


def _truth(path: Path, shape: Sequence[int], pixels: Pixels, face: Face) -> NDArray[np.bool_]:
    """Where the crop is forged: [MASK_SIZE, MASK_SIZE]. Raises InputError when the mask tells nothing of this face."""
    mask: Pixels = np.ascontiguousarray(load_picture(path).pixels[..., 0])
    if mask.shape != tuple(shape[:2]):
        raise InputError("other_size", "the mask is not of the size of its picture")
    height, width = pixels.shape[:2]
    if mask.shape != (height, width):  # the picture was shrunk to be like the others
        mask = np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    truth = mask_on_crop(mask, pixels, face.landmarks) > 127
    if truth.all() or not truth.any():
        raise InputError("all_or_nothing", "the mask covers all of the crop, or nothing of it")
    return np.asarray(truth)


def sharpness(crop: Pixels) -> float:
    """The single-feature baseline: the higher, the smoother the crop. No probability."""
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    return -float(np.log(cv2.Laplacian(grey, cv2.CV_64F).var() + 1e-3))


def places(maps: dict[str, Any], face: Face, truth: NDArray[np.bool_]) -> Row:
    """How well each map, and two that know nothing of the forgery, say where it is."""
    drawn = {name: np.asarray(rows, np.float32) for name, rows in maps.items()}
    grids = {
        name: np.asarray(cv2.resize(rows, (MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_LINEAR))
        for name, rows in drawn.items()
    }
    grids |= {OVAL: _oval(face), CENTRE: _centre()} if grids else {}
    labels = truth.ravel().astype(np.int64)
    return {
        name: {
            "auc": _short(m.auc(labels, grid.ravel().astype(np.float64))),
            "iou": [_short(m.overlap(truth, grid >= t)) for t in MAP_THRESHOLDS],
        }
        for name, grid in grids.items()
    }


def _short(value: float | None) -> float:
    assert value is not None  # `_truth` lets no mask through for which these are not defined
    return round(value, 6)


def _oval(face: Face) -> NDArray[np.float32]:
    """1 inside the face's oval: the guess that the whole face was changed."""
    [oval] = area_polygons(face.crop_landmarks)["skin"]
    grid = np.zeros((MASK_SIZE, MASK_SIZE), np.float32)
    cv2.fillPoly(grid, [(oval * (MASK_SIZE / CROP_SIZE)).round().astype(np.int32)], 1.0)
    return grid


def _centre() -> NDArray[np.float32]:
    """A bell in the middle of the crop, the same for every picture."""
    at = (np.arange(MASK_SIZE) + 0.5) / MASK_SIZE - 0.5
    square = at[:, None] ** 2 + at[None, :] ** 2
    return np.exp(-square / (2 * CENTRE_SIGMA**2)).astype(np.float32)


# ---------------------------------------------------------------- what is counted


def joined_rows(panel: Panel, rows: Sequence[Row]) -> list[Row]:
    """The rows with the answer of the fusion: it is made of the stored scores, so a new calibration costs nothing."""
    out = []
    for row in rows:
        p_fake, said = panel.joined(row["experts"])
        # What could be opened and has no answer was not assessed, which is not "real".
        unanswered = "inconclusive" if panel.calibration and not row["error"] else None
        out.append(row | {"p_fake": p_fake, "said": said or unanswered})
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
    changes: Sequence[str],
    by: Sequence[str],
    draw: Resampling,
    thresholds: Row | None = None,
) -> Row:
    """Metrics of every column, overall and in slices; robustness; the format swap; localisation.

    `rows` are those of `joined_rows`; `thresholds` is what `map_thresholds` read from another result.
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
    headline = {f"{c}.auc": s["overall"]["auc"] | {"n": s["n_scored"]} for c, s in scorers.items()}
    if FUSION in scorers:
        headline[f"{FUSION}.false_alarms"] = scorers[FUSION]["answers"]["false_alarms"]
    steady = {name: _changed(panel, samples, rows, name, draw) for name in changes}
    headline |= {f"{n}.{c}.auc": auc for n, part in steady.items() for c, auc in part["auc"].items() if c == FUSION}
    placed = localisation(samples, rows, thresholds, draw)
    headline |= {f"map:{n}.pixel_auc": s["auc"] | {"n": placed["n"]} for n, s in placed["maps"].items()}
    return {
        "headline": headline,
        "scorers": scorers,
        "common": common_auc(samples, columns, draw),
        "held_out": panel.held_out,
        "robustness": steady,
        "format_swap": _swap(panel, rows) if FORMAT_SWAP in changes else None,
        "localisation": placed,
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


def _changed(panel: Panel, samples: Sequence[Sample], rows: Sequence[Row], name: str, draw: Resampling) -> Row:
    """A change's AUC and answers, beside those of the same pictures unchanged; and how many faces it cost."""
    looked = [i for i, row in enumerate(rows) if name in row["changed"]]
    found = [i for i in looked if rows[i]["changed"][name]]
    lost = {label: sum(samples[i].label == label for i in looked) for label in ("real", "fake")}
    for i in found:
        lost[samples[i].label] -= 1
    result: Row = {"what": CHANGES[name].line, "with_face": len(looked), "lost_face": lost, "auc": {}}
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
            said = [panel.joined(rows[i]["changed"][name])[1] for i in own]
            result[what] = draw.rate([s == wrong for s in said], groups)
            result[what]["unchanged"] = float(np.mean([rows[i]["said"] == wrong for i in own])) if own else None
    return result


def _swap(panel: Panel, rows: Sequence[Row]) -> Row:
    """How far a column's value moves between a PNG and a JPEG of the same pixels."""
    result: Row = {}
    for column in panel.columns:
        moved = []
        for row in rows:
            before, after = panel.value(column, row["experts"]), panel.value(column, row["changed"].get(FORMAT_SWAP))
            if before is not None and after is not None:
                moved.append(abs(after - before))
        median, p90 = (float(np.quantile(moved, q)) if moved else None for q in (0.5, 0.9))
        result[column] = {"median": median, "p90": p90, "n": len(moved)}
    return result


def localisation(samples: Sequence[Sample], rows: Sequence[Row], thresholds: Row | None, draw: Resampling) -> Row:
    """Pixel AUC and IoU of each map over the masked fakes, mean over pictures; overall and by method."""
    masked = [i for i, s in enumerate(samples) if s.label == "fake" and s.mask is not None]
    kept = [i for i in masked if rows[i]["places"]]
    out = Counter(_unplaced(rows[i]) for i in masked if not rows[i]["places"])
    names = sorted({name for i in kept for name in rows[i]["places"]}, key=lambda n: (n in (OVAL, CENTRE), n))
    maps: Row = {}
    for name in names:
        own = [i for i in kept if name in rows[i]["places"]]
        methods = [value_of(samples[i], "method") for i in own]
        threshold = (thresholds or {}).get("of", {}).get(name, STATED_THRESHOLD)
        curve = np.array([rows[i]["places"][name]["iou"] for i in own]).mean(axis=0)
        maps[name] = _placed(samples, rows, own, name, threshold, draw) | {
            "threshold": threshold,
            "iou_by_threshold": {str(t): round(float(v), 6) for t, v in zip(MAP_THRESHOLDS, curve, strict=True)},
            "by_method": {
                method: _placed(
                    samples,
                    rows,
                    [i for i, made in zip(own, methods, strict=True) if made == method],
                    name,
                    threshold,
                    draw,
                )
                for method in sorted(set(methods))
            },
        }
    return {
        "n_masks": len(masked),
        "n": len(kept),
        "left_out": dict(sorted(out.items())),
        "threshold_from": thresholds["from"] if thresholds else "stated in advance",
        "baselines": {
            OVAL: "the whole oval of the face",
            CENTRE: f"the same bell in every crop's middle, sigma {CENTRE_SIGMA} of its side",
        },
        "maps": maps,
    }


def _unplaced(row: Row) -> str:
    return str(row["notes"].get("mask") or row["reason"] or "no map")


def _placed(
    samples: Sequence[Sample], rows: Sequence[Row], chosen: Sequence[int], name: str, threshold: float, draw: Resampling
) -> Row:
    found, groups = [rows[i]["places"][name] for i in chosen], [samples[i].group for i in chosen]
    blank, at = np.zeros(len(found), np.int64), MAP_THRESHOLDS.index(threshold)
    values = {"auc": [p["auc"] for p in found], "iou": [p["iou"][at] for p in found]}
    return {"n": len(found)} | {k: draw.measure(m.mean, blank, m.to_scores(v), groups) for k, v in values.items()}


def map_thresholds(result: Row, data: Row) -> Row:
    """The threshold with the best mean IoU of each map of another run: never of the pictures that are scored now.

    `result`: the other run's result; `data`: manifest hash and split of this one. Raises X2DFDError when they are the
    same pictures, or the other run has no maps.
    """
    other = result.get("data", {})
    same_split = other.get("split") is None or data["split"] is None or other.get("split") == data["split"]
    if other.get("sha256") == data["sha256"] and same_split:
        raise X2DFDError("a threshold may not be chosen on the pictures that are scored: name a result of others")
    maps = (result.get("localisation") or {}).get("maps")
    if not maps:
        raise X2DFDError("the result to take thresholds from has no maps")
    best = {n: max(part["iou_by_threshold"].items(), key=lambda at: at[1])[0] for n, part in maps.items()}
    source = f"manifest {other['sha256'][:12]}, split {other['split'] or 'all'}"
    return {"from": f"best mean IoU on {source}", "of": {n: float(t) for n, t in best.items()}}


def chosen_changes(text: str | None) -> list[str]:
    """All changes, none ("none"), or those named. Raises UnknownName."""
    if text is None:
        return list(CHANGES)
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in CHANGES:
            raise UnknownName("change", name, CHANGES)
    return [name for name in CHANGES if name in names]

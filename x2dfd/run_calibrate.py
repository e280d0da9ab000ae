"""`x2dfd calibrate`: the scores of experts and MLLM on labelled pictures become one probability and a band.

With `held_out`, pictures of a source are judged by expert weights that were trained without it, as a detector looks too
good on sources it knows. The MLLM then gets no weight, as its errors on new sources are unknown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from x2dfd.adapter import read_adapter_card
from x2dfd.calibration import (
    FALSE_ALARMS,
    MISSES,
    Calibration,
    Floats,
    Logits,
    fit_calibration,
    kind_of,
    logits_of,
    probabilities,
    sigmoid,
)
from x2dfd.crops import CropSet, load_sets
from x2dfd.detector import Detector, evidence_of, through_codec
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.experts import BUILTIN, Expert, load_expert
from x2dfd.files import Json
from x2dfd.loading import load
from x2dfd.manifest import Sample, manifest_sha256, read_manifest
from x2dfd.model_spec import LoadOptions, ModelSpec
from x2dfd.progress import progress
from x2dfd.tower import view_face
from x2dfd.types import KINDS, MLLM, Face

AT_ONCE = 16
VIEW_SEED = 1  # of augmented views


def calibrate(
    model: str | Path | ModelSpec,
    data: Sequence[Path],
    *,
    split: str = "calib",
    limit: int | None = None,
    false_alarms: float = FALSE_ALARMS,
    experts: Sequence[str] | None = None,
    held_out: Path | None = None,
    other_experts: bool = False,
    loading: LoadOptions | None = None,
    on_remark: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Score, fit, write `calibration.json` into the adapter directory of the model.

    `experts`: those that join, by default those of the prompt. `held_out`: a folder whose subfolders hold an expert's
    weights that were trained without some sources (`left_out` in the card). All pictures of these sources count, except
    splits `val` and `test`; of other sources, only those of `split` do. Half of the pictures are taken as they are,
    half as their augmented view. `other_experts`: take the expert weights that are here, even if the adapter was
    trained with others. `on_remark` gets what a user should know of the pictures and the fit, in sentences. Raises
    X2DFDError when a label is missing, and SetupError for a model without a directory.
    """
    if not 0 <= false_alarms <= 1:  # also not a number, which typer's bounds let pass
        raise X2DFDError(f"false_alarms must be a share from 0 to 1, not {false_alarms}", code="share_out_of_range")
    spec = ModelSpec.parse(model)
    if (adapter := spec.adapter) is None or spec.url is not None:
        raise SetupError(
            f"{spec} has no directory of its own for calibration.json: give DIR, or hub:NAME+DIR",
            code="adapter_missing",
        )
    card = read_adapter_card(adapter)
    names = list(experts) if experts is not None else list(card.experts)
    if lacking := sorted(card.experts.keys() - set(names)):
        raise X2DFDError(
            f"the prompt states the score of expert {lacking[0]!r}: name it among the experts, too",
            code="expert_not_calibrated",
        )
    if len(set(names)) < len(names):
        raise X2DFDError(f"an expert is named twice: {', '.join(names)}", code="expert_twice")
    options: LoadOptions = {**(loading or {}), "mode": "paper", "experts": names, "other_experts": other_experts}
    detector = load(spec, **options, ignore_calibration=True)  # one of other experts would prevent loading
    held_out_sets = held_out_in(held_out, names) if held_out else []
    sets = load_sets(data, side=detector.info.crop_size)
    scorer = partial(_scorer, split=split, held_out_sets=held_out_sets, never=card.held_out)
    chosen = [
        (crops, _some(crops, [i for i, s in enumerate(crops.samples) if scorer(s) == number], limit), held_out_set)
        for crops in sets
        for number, held_out_set in enumerate([None, *held_out_sets])
    ]
    for path, crops in zip(data, sets, strict=True):
        if lost := crops.lost([s.id for s in read_manifest(path) if scorer(s) is not None]):
            on_remark(lost)
    samples = [crops.samples[i] for crops, indices, _ in chosen for i in indices]
    fakes = _checked_labels(samples, split)
    rows = [row for crops, indices, held_out_set in chosen for row in _scores(detector, crops, indices, held_out_set)]
    logits = _columns(rows, None if held_out_sets else MLLM)
    kinds = [kind_of(s.df_class) if s.label == "fake" else "" for s in samples]
    result = fit_calibration(logits, kinds, [s.origin for s in samples], false_alarms=false_alarms)
    facts = _facts(result, logits, samples, fakes)
    facts |= {
        "manifests": [manifest_sha256(path) for path in data],
        "split": split,
        "false_alarms_allowed": false_alarms,
        "misses_allowed": MISSES,
        "experts": {e.card.name: e.card.sha256 for e in detector.experts},
        "unseen": [
            {"expert": name, "sha256": expert.card.sha256, "left_out": sorted(held_out_set.left_out)}
            for held_out_set in held_out_sets
            for name, expert in held_out_set.experts.items()
        ],
    }
    result = replace(result, mllm_threshold=_mllm_threshold(rows, fakes, false_alarms), fitted_on=facts)
    result.save(adapter)
    for line in _remarks(result, logits):
        on_remark(line)
    return result


def _some(crops: CropSet, indices: list[int], limit: int | None) -> list[int]:
    """At most `limit` of them, drawn: as many of each label, or all of the one that has fewer."""
    if limit is None or len(indices) <= limit:
        return indices
    drawn = [int(i) for i in np.random.default_rng(0).permutation(indices)]
    by_label = [[i for i in drawn if crops.samples[i].label == label] for label in ("real", "fake")]
    return sorted(i for _, i in sorted((rank, i) for rows in by_label for rank, i in enumerate(rows))[:limit])


def _remarks(result: Calibration, logits: dict[str, dict[str, Floats]]) -> Iterator[str]:
    """What a fit cannot know, and which experts got no weight in it, in sentences."""
    if few := result.few_pictures:
        yield few
    if "part" not in result.kinds:
        yield "no fakes changed in part among the pictures: the rule knows faces made as a whole only"
    if "whole" not in result.kinds:
        yield "no faces made as a whole among the pictures: the rule knows fakes changed in part only"
    for name, weight in result.weights.items():
        if weight > 0:
            continue
        scores = [logits[kind][name] for kind in result.kinds if name in logits[kind]]
        if not scores:
            reason = "the kind of fake that its card names (covers) is not among the pictures"
        elif not any(np.isfinite(column).any() for column in scores):
            reason = "it gave no score to any picture"
        else:
            reason = "its score did not help on these pictures"
        yield f"{name} has no weight: {reason}"


def _checked_labels(samples: Sequence[Sample], split: str) -> NDArray[np.bool_]:
    """Whether each is fake. Raises X2DFDError where the manifest does not say enough; nothing has been scored yet."""
    if unclear := [s.id for s in samples if s.label == "fake" and s.df_class not in ("EFS", "FS", "FR", "FE")]:
        raise X2DFDError(
            f"{len(unclear)} fakes without df_class (FS, FR, FE, EFS), such as {unclear[0]}", code="df_class_missing"
        )
    fakes = np.array([s.label == "fake" for s in samples], bool)
    if not 0 < fakes.sum() < len(fakes):
        raise X2DFDError(
            f"split {split!r} (column `split` of the manifest) needs real and fake pictures to calibrate on",
            code="no_picture_of_label",
        )
    return fakes


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Experts whose weights were trained without the same sources, generators or methods."""

    experts: dict[str, Expert]
    left_out: frozenset[str]


def held_out_in(folder: Path, names: Sequence[str]) -> list[HeldOut]:
    """The held-out experts of each folder in `folder`. Several of them may leave out the same source.

    Raises X2DFDError where a card names no source, where the cards of one folder name different ones, and where a
    folder lacks an expert of this package or one that another folder has: its own weights know the source.
    """
    found: list[HeldOut] = []
    for place in sorted({path.parent for path in folder.glob("*/*.card.json")}):
        experts = {name: load_expert(name, place) for name in names if (place / f"{name}.card.json").is_file()}
        if not experts:
            continue
        stated: list[object] = [expert.card.figures.get("left_out") for expert in experts.values()]
        lists = [sources for sources in stated if isinstance(sources, list)]
        if len(lists) < len(stated) or not all(isinstance(s, str) for sources in lists for s in sources):
            raise X2DFDError(f"{place}: a card's `left_out` must be a list of names", code="left_out_invalid")
        left_out = {frozenset(sources) for sources in lists}
        if len(left_out) > 1 or not all(left_out):
            raise X2DFDError(f"{place}: the cards' `left_out` must name the same sources", code="left_out_invalid")
        found.append(HeldOut(experts, left_out.pop()))
    if not found:
        raise X2DFDError(f"no folder in {folder} holds weights of {', '.join(names)}", code="left_out_missing")
    every = {name for held_out_set in found for name in held_out_set.experts} | (set(names) & BUILTIN.keys())
    if lacking := sorted({name for held_out_set in found for name in every - held_out_set.experts.keys()}):
        raise X2DFDError(f"{folder}: not every folder holds weights of {lacking[0]}", code="left_out_invalid")
    return found


def _scorer(sample: Sample, split: str, held_out_sets: Sequence[HeldOut], never: Collection[str]) -> int | None:
    """Whose scores of a picture count: those of the first held-out experts that never met its source, counted from 1;
    else the adapter's own, 0; None: it does not count, as with every fake of a method in `never`.

    A generator's pictures are judged by the adapter's own experts: those that never met it would forbid every "real".
    """
    if set(sample.method.split("+")) & set(never):
        return None
    for number, held_out_set in enumerate(held_out_sets, start=1):
        if sample.origin in held_out_set.left_out and not sample.synthetic:
            return number if sample.split not in ("val", "test") else None
    return 0 if sample.split == split else None


def _scores(detector: Detector, crops: CropSet, rows: Sequence[int], held_out_set: HeldOut | None) -> list[Logits]:
    """Each picture's logits by kind and name; of held-out experts instead of the detector's of that name."""
    experts = [held_out_set.experts.get(e.card.name, e) if held_out_set else e for e in detector.experts]
    covers = {e.card.name: e.card.covers for e in experts}
    scores = []
    for start in progress(range(0, len(rows), AT_ONCE), "scoring"):
        faces = [face_of(crops, i, VIEW_SEED) for i in rows[start : start + AT_ONCE]]
        if held_out_set:
            mllm_logits, evidence = np.full(len(faces), np.nan), evidence_of(experts, through_codec(faces))
        else:
            mllm_logits, evidence = detector.judge_faces(faces)
        for mllm_logit, face_evidence in zip(mllm_logits, evidence, strict=True):
            scores.append(logits_of(None if np.isnan(mllm_logit) else float(mllm_logit), face_evidence, covers))
    return scores


def face_of(crops: CropSet, i: int, view_seed: int) -> Face:
    """Sample i, as it is or as its augmented view. The id decides, as a manifest may alternate real and fake."""
    if hashlib.sha256(crops.samples[i].id.encode()).digest()[0] % 2:
        return view_face(crops, i, view_seed)
    return plain_face(crops, i)


def plain_face(crops: CropSet, i: int) -> Face:
    """Sample i as it is."""
    crop, points = np.asarray(crops.crops[i]), crops.landmarks[i]
    size = float(crop.shape[0])
    large = None if crops.large is None else np.asarray(crops.large[i])
    return Face(0, (0.0, 0.0, size, size), points, 1.0, crop, points, 0.0, large)


def _columns(rows: Sequence[Logits], mllm: str | None) -> dict[str, dict[str, Floats]]:
    """Kind -> name -> logits [n], NaN where a score is missing; with those of the MLLM if `mllm` is given."""
    names = {kind: sorted({n for row in rows for n in row[kind] if n != MLLM or mllm}) for kind in KINDS}
    return {
        kind: {n: np.array([np.nan if (v := row[kind].get(n)) is None else v for row in rows]) for n in names[kind]}
        for kind in KINDS
    }


def _mllm_threshold(rows: Sequence[Logits], fakes: NDArray[np.bool_], share: float) -> float:
    """The MLLM's P(fake) that a `share` of the real pictures reach, for mode="paper"; 0.5 without scores."""
    logits = [row[KINDS[0]].get(MLLM) for row in rows]
    reals = [float(sigmoid(v)) for v, fake in zip(logits, fakes, strict=True) if v is not None and not fake]
    return round(float(np.quantile(reals, 1 - share)), 6) if reals else 0.5


def _facts(
    result: Calibration, logits: dict[str, dict[str, Floats]], samples: Sequence[Sample], fakes: NDArray[np.bool_]
) -> Json:
    p_fake = probabilities(result, logits, len(samples))
    labels = np.array([result.verdict(float(p)).label for p in p_fake])
    names = np.array([s.origin for s in samples])

    def rates(label: str, rows: NDArray[np.bool_]) -> Json:
        hits_of = {str(n): labels[rows & (names == n)] == label for n in sorted(set(names[rows]))}
        return {n: {"rate": round(float(hits.mean()), 4), "n": len(hits)} for n, hits in hits_of.items()}

    return {
        "n_real": int((~fakes).sum()),
        "n_fake": int(fakes.sum()),
        "groups": len({s.group for s in samples}),
        "false_alarms": rates("fake", ~fakes),
        "misses": rates("real", fakes),
        "answered": round(float((labels != "inconclusive").mean()), 4),
        "fakes_found": round(float((labels[fakes] == "fake").mean()), 4),
    }

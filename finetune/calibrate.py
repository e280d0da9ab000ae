"""`python -m finetune.calibrate --adapter DIR --data MANIFEST`: fit the last step on a split kept for it.

MLLM logit and expert logits of split `calib` become one probability (x2dfd.calibration), and the inconclusive band is
set from false alarms on every real source and fakes called real, also of sources that the fit left out. Writes
`calibration.json` into the adapter directory.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from x2dfd.adapter import AdapterCard, read_adapter_card
from x2dfd.calibration import (
    MLLM,
    Calibration,
    chances_of_sources_left_out,
    choose_band,
    fit_calibration,
    logit,
    rows_of,
)
from x2dfd.cli import run_command
from x2dfd.crops import CropSet, load_crops
from x2dfd.detector import Detector, LanguageModel, load
from x2dfd.errors import SetupError, UnknownName, X2DFDError
from x2dfd.experts import Expert, load_expert
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.progress import progress
from x2dfd.tower import view_face
from x2dfd.types import Evidence, Face


def calibrate(
    adapter: Path,
    data: Path,
    *,
    split: str = "calib",
    limit: int | None = None,
    view_seed: int = 1,
    false_alarms: float = 0.05,
    disagreement: float | None = None,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    other_experts: bool = False,
    unseen: Path | None = None,
) -> Calibration:
    """Score the split, fit, write. Half of the pictures are taken as they are, half as their degraded training view.

    `disagreement`: no verdict where the parts are further apart than this; None: their spread decides nothing. `add`:
    experts that join the fusion though the MLLM was not trained with them: its prompt stays as it was. Those of the
    present calibration stay, unless they are among `drop`. `other_experts`: take the expert weights that are here, also
    where the adapter was trained with others. `unseen`: a folder with, for a source of photos or a generator, a folder
    of experts that were trained without it, and with adapters that were (`left_out`); the fit then also knows what they
    say of pictures new to them. An origin that nothing was trained without is taken as it is: train without every one
    that experts and MLLM have learnt from. Raises X2DFDError when the split lacks a label, UnknownName for a `drop`
    that is not an added expert.
    """
    if disagreement is not None and not 0 < disagreement < 1:
        raise X2DFDError(f"disagreement {disagreement}: the spread of probabilities lies between 0 and 1")
    crops = load_crops(data)
    # What was kept out of training for figures on unseen methods is kept out here too.
    rows = _chosen(crops, split, limit, read_adapter_card(adapter).held_out)
    samples = [crops.samples[i] for i in rows]
    labels = np.array([float(s.label == "fake") for s in samples])
    if not 0 < labels.sum() < len(labels):
        raise X2DFDError(f"split {split!r} of {data} needs real and fake pictures to calibrate on")
    try:
        present = Calibration.load(adapter)
        earlier = [name for name in present.weights if name != MLLM]
        if unseen is None and present.fitted_on.get("fitted_also_unseen"):
            print(
                "note: the present calibration also knew what experts and MLLM say of cameras and generators that they "
                "never met; without --unseen this one takes them as if nothing were new to them",
                file=sys.stderr,
            )
    except SetupError:
        earlier = []
        (adapter / "calibration.json").unlink(missing_ok=True)  # a broken one would keep the adapter from loading
    in_prompt = read_adapter_card(adapter).experts
    added = [name for name in dict.fromkeys([*earlier, *add]) if name not in in_prompt]
    for name in drop:
        if name not in added:
            raise UnknownName("added expert", name, added)
    names = [*in_prompt, *(name for name in added if name not in drop)]
    detector = load(adapter, mode="paper", experts=names, other_experts=other_experts)
    origins = {s.origin for s in samples}
    without: dict[str, Without] = {}
    if unseen is not None:
        without = trained_without(unseen, origins, [e.card.name for e in detector.experts], read_adapter_card(adapter))
    parts = score_parts(detector, crops, rows, view_seed)
    weights_per_sample = balance(samples)
    one_sided = [e.card.name for e in detector.experts if getattr(e, "one_sided", False)]
    sources = [s.source for s in samples]
    new = score_unseen(detector, parts, crops, rows, without, view_seed) if without else None
    fit = fit_calibration(
        parts, labels, sources, weights_per_sample, one_sided=one_sided, false_alarms=false_alarms, unseen=new
    )
    reals, fakes = (
        chances_of_sources_left_out(
            parts, labels, sources, weights_per_sample, one_sided=one_sided, unseen=new, fakes=fakes
        )
        for fakes in (False, True)
    )
    mllm = 1 / (1 + np.exp(-parts[MLLM]))
    _, mllm_threshold = choose_band(mllm, labels, sources, false_alarms=false_alarms)
    result = replace(fit, mllm_threshold=mllm_threshold, disagreement=disagreement)
    logits = rows_of(parts)
    said = np.array([result.verdict(result.probability(row), row).label for row in logits])
    real = labels == 0
    fitted = {
        "manifest_sha256": manifest_sha256(data),
        "split": split,
        "n_real": int(real.sum()),
        "n_fake": int((~real).sum()),
        "groups": len({s.group for s in samples}),
        "false_alarms_allowed": false_alarms,
        "false_alarms_per_source": _rates(said == "fake", samples, real),
        "false_alarms_of_a_source_left_out": {
            source: {
                "rate": round(float((p >= result.high).mean()), 4),
                "inconclusive": round(float(((p >= result.low) & (p < result.high)).mean()), 4),
                "n": len(p),
            }
            for source, p in reals.items()
        },
        "fakes_of_a_source_left_out": {
            source: {
                "called_real": round(float((p < result.low).mean()), 4),
                "found": round(float((p >= result.high).mean()), 4),
                "n": len(p),
            }
            for source, p in fakes.items()
        },
        "inconclusive": round(float((said == "inconclusive").mean()), 4),
        "fitted_also_unseen": {o: w.hashes() for o, w in without.items()},
        "experts": {e.card.name: e.card.sha256 for e in detector.experts},
        "fakes_found": round(float((said[~real] == "fake").mean()), 4),
    }
    result = replace(result, fitted_on=fitted)
    result.save(adapter)
    return result


def score_parts(
    detector: Detector, crops: CropSet, rows: Sequence[int], view_seed: int, *, all_score: bool = True
) -> dict[str, NDArray[np.float64]]:
    """Logits of the MLLM and of each expert: name -> [n], NaN where a score is missing.

    Raises X2DFDError when one has no score at all, if `all_score`: of a part of the pictures it need not.
    """
    names = [MLLM, *detector.facts["experts"]]
    table: dict[str, list[float]] = {n: [] for n in names}
    notes: dict[str, str] = {}
    for start in progress(range(0, len(rows), 16), "scoring"):
        part = rows[start : start + 16]
        faces = [_face(crops, i, view_seed if _degraded(crops.samples[i].id) else None) for i in part]
        own, evidence = detector.judge_faces(faces)
        table[MLLM] += own.tolist()
        for said in evidence:
            for e in said:
                table[e.expert].append(_logit(e))
                if e.score is None and e.note:
                    notes[e.expert] = e.note
    for name in names if all_score else ():
        if not np.isfinite(table[name]).any():  # it would get no weight, and nobody would know why
            raise X2DFDError(
                f"{name} gave no score for any of {len(rows)} pictures: {notes.get(name, 'no reason given')}"
            )
    return {n: np.array(v) for n, v in table.items()}


@dataclass(frozen=True)
class Without:
    """What was trained without a source or generator."""

    experts: Mapping[str, Expert]
    adapter: Path | None = None

    def hashes(self) -> dict[str, str]:
        mllm = {} if self.adapter is None else {MLLM: read_adapter_card(self.adapter).sha256}
        return {n: e.card.sha256 for n, e in self.experts.items()} | mllm


SAME = (
    "base", "tower_layers", "text_layers", "feature_layers", "frame", "prompt_sha256", "score_form", "experts", "tower",
    "held_out",
)  # fmt: skip
"""What adapters must have in common for one to tell what another would say."""


def trained_without(
    folder: Path, origins: Collection[str], names: Collection[str], card: AdapterCard
) -> dict[str, Without]:
    """By source or generator: the experts in `folder`/origin that never saw it, and the adapter in `folder` whose card
    has it among `left_out`.

    Raises X2DFDError where a folder has none of `names`, where a card does not say that the origin was held out, where
    an adapter is asked otherwise than that of `card` or another was trained without the same origin, or where nothing
    was trained without any of `origins`; SetupError for weights that cannot be read.
    """
    experts: dict[str, dict[str, Expert]] = {}
    for origin in sorted({o for o in origins if o and (folder / o).is_dir()}):
        here = [name for name in names if (folder / origin / f"{name}.card.json").is_file()]
        if not here and (folder / origin / "card.json").is_file():
            continue  # an adapter that was named so
        experts[origin] = {name: load_expert(name, folder / origin) for name in here}
        for name, expert in experts[origin].items():
            held_out = expert.card.figures.get("held_out")
            if not isinstance(held_out, list) or origin not in held_out:
                raise X2DFDError(f"{folder / origin}: the card of {name!r} does not say that it never saw {origin}")
        if not here:
            raise X2DFDError(f"{folder / origin} holds no weights of {', '.join(names)}")
    models: dict[str, Path] = {}
    for adapter in sorted(p.parent for p in folder.glob("*/card.json")):
        other = read_adapter_card(adapter)
        left_out = [o for o in other.left_out if o in origins]
        if not left_out:
            raise X2DFDError(f"{adapter}: its card does not say that it never saw any of {', '.join(sorted(origins))}")
        if twice := [o for o in left_out if o in models]:
            raise X2DFDError(f"{adapter}: another adapter in {folder} was trained without {twice[0]} too; keep one")
        for key in SAME:
            if getattr(other, key) != getattr(card, key):
                raise X2DFDError(f"{adapter} differs from the calibrated one in {key}: it tells nothing of that one")
        models |= dict.fromkeys(left_out, adapter)
    if not experts and not models:
        raise X2DFDError(f"{folder}: nothing in it was trained without any of {', '.join(sorted(set(origins)))}")
    found = {o: Without(experts.get(o, {}), models.get(o)) for o in {*experts, *models}}
    return dict(sorted(found.items(), key=lambda item: (str(item[1].adapter), item[0])))


def score_unseen(
    detector: Detector,
    parts: dict[str, NDArray[np.float64]],
    crops: CropSet,
    rows: Sequence[int],
    without: Mapping[str, Without],
    view_seed: int,
) -> dict[str, NDArray[np.float64]]:
    """`score_parts` with each picture's source or generator new to what is in `without`, the MLLM asked anew.

    An expert without weights for an origin, and every picture of an origin that is not in `without`, keeps its score,
    also where it learnt from that origin.
    """
    told = {name: values.copy() for name, values in parts.items()}
    loaded: tuple[Path | None, LanguageModel] = (None, detector.mllm)
    for origin, others in without.items():  # those of one adapter follow each other: it is loaded once
        if others.adapter != loaded[0]:
            model = load(others.adapter, mode="paper", experts=()) if others.adapter else detector
            loaded = (others.adapter, model.mllm)
        mine = [k for k, i in enumerate(rows) if crops.samples[i].origin == origin]
        experts = [others.experts.get(e.card.name, e) for e in detector.experts]
        asked = Detector(loaded[1], experts, None, detector.facts, "paper")
        of_mine = score_parts(asked, crops, [rows[k] for k in mine], view_seed, all_score=False)
        for name, values in of_mine.items():
            told[name][mine] = values
    return told


def balance(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Weights that give each label a half, and within it the root of each source-and-method's size."""
    weights = np.zeros(len(samples))
    keys = [(s.label, s.source if s.label == "real" else s.method.split("+")[0]) for s in samples]
    for key in set(keys):
        mine = np.array([k == key for k in keys])
        weights[mine] = mine.sum() ** -0.5
    for label in ("real", "fake"):
        mine = np.array([s.label == label for s in samples])
        weights[mine] /= weights[mine].sum() * 2
    return weights


def _chosen(crops: CropSet, split: str, limit: int | None, held_out: Sequence[str]) -> list[int]:
    rows = [int(i) for i in crops.where(split=split) if not set(crops.samples[i].method.split("+")) & set(held_out)]
    if limit is not None and len(rows) > limit:
        rows = sorted(int(i) for i in np.random.default_rng(0).choice(rows, limit, replace=False))
    return rows


def _face(crops: CropSet, i: int, view_seed: int | None) -> Face:
    if view_seed is not None:
        return view_face(crops, i, view_seed)
    crop, points = np.asarray(crops.crops[i]), crops.landmarks[i]
    size = float(crop.shape[0])
    return Face(0, (0.0, 0.0, size, size), points, 1.0, crop, points, 0.0)


def _degraded(name: str) -> bool:
    """Half of the pictures, by their id: a manifest may put reals and fakes by turns."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


def _logit(evidence: Evidence) -> float:
    return float("nan") if evidence.score is None else logit(evidence.score)


def _rates(said_fake: NDArray[np.bool_], samples: Sequence[Sample], real: NDArray[np.bool_]) -> dict[str, Any]:
    sources = np.array([s.source for s in samples])
    return {
        str(src): {
            "rate": round(float(said_fake[real & (sources == src)].mean()), 4),
            "n": int((real & (sources == src)).sum()),
        }
        for src in sorted(set(sources[real]))
    }


_EPILOG = """Example:\n
  python -m finetune.calibrate --adapter build/adapter --data build/forged/manifest.jsonl
"""


def _run(
    adapter: Annotated[Path, typer.Option(help="adapter directory; calibration.json is written there")],
    data: Annotated[Path, typer.Option(help="manifest with a split kept for calibration")],
    split: Annotated[str, typer.Option(help="that split's name")] = "calib",
    limit: Annotated[int | None, typer.Option(help="at most this many pictures, drawn at random")] = None,
    false_alarms: Annotated[float, typer.Option(help="bound on real pictures called fake, in every source")] = 0.05,
    disagreement: Annotated[
        float | None, typer.Option(help="no verdict where experts are further apart than this (0..1); default: never")
    ] = None,
    add: Annotated[
        str, typer.Option(help="experts that join though the MLLM does not know them, comma-separated; they stay")
    ] = "",
    drop: Annotated[str, typer.Option(help="experts that joined so and shall not stay, comma-separated")] = "",
    other_experts: Annotated[
        bool, typer.Option(help="take the expert weights that are here, whatever trained it")
    ] = False,
    unseen: Annotated[
        Path | None,
        typer.Option(help="folder with experts and adapters that were trained without some sources and generators"),
    ] = None,
) -> None:
    """Fit the calibrated probability and the inconclusive band."""
    result = calibrate(
        adapter,
        data,
        split=split,
        limit=limit,
        false_alarms=false_alarms,
        disagreement=disagreement,
        add=[n for n in add.split(",") if n],
        drop=[n for n in drop.split(",") if n],
        other_experts=other_experts,
        unseen=unseen,
    )
    print(json.dumps({"weights": result.weights, "low": result.low, "high": result.high, **result.fitted_on}, indent=1))


if __name__ == "__main__":
    run_command(_run, _EPILOG)

"""Quality against cost, of peers side by side: `python -m benchmarks.quality --data MANIFEST`.

Every variant scores the same aligned crops of labelled pictures, in turns: the forensic tower as in a verdict, with
products in fp32 and in bf16; a linear probe on unchanged CLIP, fitted here on the other sources; and the recipe as
published, the language model's own number. Without `--data` the plot is drawn from an existing result file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from x2dfd.calibration import sigmoid
from x2dfd.cli import run_command
from x2dfd.errors import X2DFDError
from x2dfd.files import Json, write_text
from x2dfd.types import Face

BATCH = 8  # faces in a call
FOLDS = 5
FP32, BF16, PROBE, RECIPE = "verdict, fp32", "verdict, bf16", "linear probe on CLIP", "published recipe"
Floats = NDArray[np.float64]
Score = Callable[[Sequence[Face]], NDArray[Any]]  # of each face: P(fake), or the features that a probe is fitted on


def in_turns(variants: Mapping[str, Score], faces: Sequence[Face]) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Each variant's output for all faces, and its median seconds a face; the first batch also serves as a warm-up."""
    outputs: dict[str, list[NDArray[Any]]] = {name: [] for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for score in variants.values():
        score(faces[:BATCH])
    for number, at in enumerate(range(0, len(faces), BATCH)):
        batch = faces[at : at + BATCH]
        for name in list(variants)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            outputs[name].append(variants[name](batch))
            seconds[name].append((time.perf_counter() - start) / len(batch))
    return {k: np.concatenate(v) for k, v in outputs.items()}, {k: float(np.median(v)) for k, v in seconds.items()}


def probe(features: NDArray[Any], fake: NDArray[np.bool_], sources: Sequence[str]) -> Floats:
    """P(fake) of each face by a logistic regression on the faces of the other sources."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(sources)) < 2:
        raise X2DFDError("a probe needs two sources: one to fit it on, another to judge it by", code="too_few_sources")
    folds = GroupKFold(min(FOLDS, len(set(sources))))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    probabilities = cross_val_predict(model, features, fake, groups=list(sources), cv=folds, method="predict_proba")
    return np.asarray(probabilities[:, 1], float)


def scorers() -> dict[str, tuple[Score, float]]:
    """Each variant, with the megabytes of its weights in the precision of its computation."""
    import torch

    import x2dfd
    from x2dfd import prompts
    from x2dfd.adapter import EMBEDDED, TOWER
    from x2dfd.experts import Shared, load_expert
    from x2dfd.tower import HEAD_LAYERS, tower_states

    expert: Any = load_expert("tower", EMBEDDED / "experts")
    layers = max(HEAD_LAYERS)

    def crops_of(faces: Sequence[Face]) -> torch.Tensor:
        return torch.from_numpy(np.stack([f.crop for f in faces]))

    def verdict(dtype: torch.dtype) -> Score:
        def score(faces: Sequence[Face]) -> Floats:
            states = tower_states(crops_of(faces), layers, EMBEDDED / TOWER, dtype)
            return np.array([e.score for e in expert.judge(faces, Shared(states, expert.tower))], float)

        return score

    def features(faces: Sequence[Face]) -> NDArray[Any]:
        last = tower_states(crops_of(faces), layers)[-1]
        return torch.cat([last[:, 0], last[:, 1:].mean(1)], 1).numpy()

    detector = x2dfd.load(mode="paper", dtype="fp32")
    mllm: Any = detector.mllm

    def number(faces: Sequence[Face]) -> Floats:
        encoding = mllm.encode(np.stack([f.crop for f in faces]))
        blocks = [detector.for_prompt(evidence) for evidence in detector.evidence(faces, encoding)]
        questions = [prompts.verdict_question(evidence, detector.info.score_form) for evidence in blocks]
        return sigmoid(mllm.verdict_logits(encoding, questions))

    def megabytes(model: Any) -> float:
        return float(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6)

    tower = megabytes(mllm._model.model.vision_tower)
    return {
        FP32: (verdict(torch.float32), tower),
        BF16: (verdict(torch.bfloat16), tower / 2),
        PROBE: (features, tower),
        RECIPE: (number, megabytes(mllm._model)),
    }


def draw(result: Json, file: Path) -> None:
    """Seconds a face against AUC with its interval; the larger a dot, the more megabytes of weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for variant in result["ways"]:
        at, value, interval = variant["seconds"], variant["auc"]["value"], variant["auc"]["interval"]
        dot = axes.scatter(at, value, s=max(variant["megabytes"] / 4, 10))
        axes.scatter([], [], s=40, color=dot.get_facecolor(), label=variant["name"])
        if interval:
            axes.plot([at, at], interval, color="grey", linewidth=0.8, zorder=0)
    data = result["data"]
    label = f"AUC, {data['n_fake']} fakes, {data['n_real']} photos"
    axes.set(xscale="log", xlabel=f"seconds a face, {result['threads']} CPU threads", ylabel=label)
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    seconds = [variant["seconds"] for variant in result["ways"]]
    axes.set_xlim(min(seconds) / 1.5, max(seconds) * 2.5)
    axes.legend(loc="best", fontsize=8)  # names beside dots that are close would overlap
    axes.set_title("Quality against cost")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def measure(manifest: Path, limit: int, threads: int) -> Json:
    """Score the same faces with every variant, in turns. Raises X2DFDError for one label or one source only."""
    import torch

    from eval.bench import code_state
    from eval.stats import auc_difference, measured_auc
    from x2dfd.crops import load_crops
    from x2dfd.detector import through_codec, versions
    from x2dfd.manifest import manifest_sha256

    torch.set_num_threads(threads)
    crops = load_crops(manifest)
    rows = sorted({int(i) for i in np.linspace(0, len(crops.samples) - 1, limit)})
    size = float(crops.crops.shape[1])
    faces = [
        Face(0, (0.0, 0.0, size, size), crops.landmarks[i], 1.0, np.array(crops.crops[i]), crops.landmarks[i], 0.0)
        for i in rows
    ]
    faces = [replace(f, index=k) for k, f in enumerate(through_codec(faces))]
    samples = [crops.samples[i] for i in rows]
    fake, groups = np.array([s.label == "fake" for s in samples]), [s.group for s in samples]
    if fake.all() or not fake.any():
        raise X2DFDError(f"{manifest}: real and fake pictures are needed", code="no_picture_of_label")
    variants = scorers()
    outputs, seconds = in_turns({name: score for name, (score, _) in variants.items()}, faces)
    scores = {n: probe(v, fake, [s.source for s in samples]) if v.ndim > 1 else v for n, v in outputs.items()}
    labels = fake.astype(np.int64)
    figures = [
        {
            "name": name,
            "seconds": round(seconds[name], 4),
            "megabytes": round(megabytes),
            "auc": asdict(measured_auc(labels, scores[name], groups)),
        }
        for name, (_, megabytes) in variants.items()
    ]
    shifts = np.abs(scores[BF16] - scores[FP32])
    return {
        "task": {"name": "quality", "version": 1},
        "data": {"sha256": manifest_sha256(manifest), "n_fake": int(fake.sum()), "n_real": int((~fake).sum())},
        "hashes": {"manifest": manifest_sha256(manifest)},
        "threads": threads,
        "ways": figures,
        "bf16_against_fp32": {
            "auc": asdict(auc_difference(labels, scores[BF16], scores[FP32], groups)),
            "p_median": round(float(np.median(shifts)), 5),
            "p_90": round(float(np.quantile(shifts, 0.9)), 5),
        },
        "code": code_state(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def run(
    data: Annotated[
        Path | None, typer.Option(metavar="MANIFEST", help="Labelled pictures with their sources; none: only draw.")
    ] = None,
    out: Annotated[Path, typer.Option(help="result file, written or, without --data, read")] = Path(
        "build/quality.json"
    ),
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="by default beside --out")] = None,
    limit: Annotated[int, typer.Option(min=BATCH, help="pictures, spread evenly over the manifest")] = 96,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Score pictures in every way and draw quality against cost."""
    if data is not None:
        write_text(out, json.dumps(measure(data, limit, threads), indent=1) + "\n")
    try:
        result = json.loads(out.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise X2DFDError(f"{out} is no result file ({error}): give --data", code="not_a_result") from error
    plot = plot or out.with_suffix(".png")
    plot.parent.mkdir(parents=True, exist_ok=True)
    draw(result, plot)
    print(json.dumps({k: result[k] for k in ("ways", "bf16_against_fp32")}, indent=1))


if __name__ == "__main__":
    run_command(
        run,
        "Examples:\n\n  python -m benchmarks.quality --data build/forged/manifest.jsonl\n\n"
        "  python -m benchmarks.quality --out eval/results/quality.json --plot docs/quality.png",
    )

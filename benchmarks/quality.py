"""Quality against cost, of peers side by side: `python -m benchmarks.quality --data MANIFEST`.

Every way scores the same aligned crops of labelled pictures, in turns: the forensic tower as a verdict reads it, in
fp32 and with products in bf16; a linear probe on CLIP as it is, fitted here on the other sources; and the language
model's own number, as published. Of each: seconds a face, megabytes of weights, AUC. A table and one plot.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from x2dfd.cli import run_command
from x2dfd.errors import X2DFDError
from x2dfd.files import write_text
from x2dfd.types import Face

BATCH = 8  # faces in a call
FOLDS = 5
Floats = NDArray[np.float64]
Score = Callable[[Sequence[Face]], NDArray[Any]]  # of each face: P(fake), or the features that a probe is fitted on


@dataclass(frozen=True)
class Way:
    """What a way of scoring costs and gives."""

    name: str
    seconds: float  # a face, the median over batches
    megabytes: float  # of weights as they are computed with
    auc: float
    n: int


def in_turns(ways: Mapping[str, Score], faces: Sequence[Face]) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """What each way gives for all faces, and its median seconds a face; the first batch warms up and is done twice."""
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for score in ways.values():
        score(faces[:BATCH])
    for number, at in enumerate(range(0, len(faces), BATCH)):
        part = faces[at : at + BATCH]
        for name in list(ways)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            found[name].append(ways[name](part))
            seconds[name].append((time.perf_counter() - start) / len(part))
    return {k: np.concatenate(v) for k, v in found.items()}, {k: float(np.median(v)) for k, v in seconds.items()}


def probe(features: NDArray[Any], fake: NDArray[np.bool_], sources: Sequence[str]) -> Floats:
    """P(fake) of each face by a logistic regression on the faces of the other sources."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(sources)) < 2:
        raise X2DFDError(
            "a probe needs pictures of two sources at least: one to fit it on, another to judge it by",
            code="too_few_sources",
        )
    folds = GroupKFold(min(FOLDS, len(set(sources))))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    chances = cross_val_predict(model, features, fake, groups=list(sources), cv=folds, method="predict_proba")
    return np.asarray(chances[:, 1], float)


def scorers(recipe: bool) -> dict[str, tuple[Score, float]]:
    """Each way with its megabytes of weights."""
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

    found: dict[str, tuple[Score, float]] = {
        "verdict, fp32": (verdict(torch.float32), 344),
        "verdict, bf16 products": (verdict(torch.bfloat16), 172),
        "linear probe on CLIP": (features, 344),
    }
    if recipe:
        detector = x2dfd.load(mode="paper")
        mllm: Any = detector.mllm

        def number(faces: Sequence[Face]) -> Floats:
            look = mllm.look(np.stack([f.crop for f in faces]))
            asked = [
                prompts.verdict_question(said, detector.info.score_form) for said in detector.evidence(faces, look)
            ]
            return np.asarray(mllm.verdict_logits(look, asked))

        weights = sum(p.numel() * p.element_size() for p in mllm._model.parameters())
        found["language model's number"] = (number, weights / 1e6)
    return found


def table(ways: Sequence[Way]) -> str:
    """As Markdown."""
    lines = [f"| {w.name} | {w.seconds:.3f} | {w.megabytes:.0f} | {w.auc:.3f} |" for w in ways]
    return "\n".join(["| way | seconds a face | MB of weights | AUC |", "|---|---|---|---|", *lines]) + "\n"


def plot(ways: Sequence[Way], file: Path) -> None:
    """Seconds a face against AUC."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for way in ways:
        axes.scatter(way.seconds, way.auc, s=max(way.megabytes / 4, 10))
        axes.annotate(way.name, (way.seconds, way.auc), (6, 6), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="seconds a face", ylabel=f"AUC, {ways[0].n} pictures", title="Quality against cost")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def run(
    data: Annotated[Path, typer.Option(metavar="MANIFEST", help="Labelled pictures with their sources.")],
    out: Annotated[Path, typer.Option(help="result file; .md and .png are written beside it")] = Path(
        "build/quality.json"
    ),
    limit: Annotated[int, typer.Option(min=BATCH, help="pictures, spread evenly over the manifest")] = 300,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    recipe: Annotated[bool, typer.Option(help="the language model's number too, which takes longest")] = True,
) -> None:
    """Score the same faces in every way, in turns."""
    import torch
    from sklearn.metrics import roc_auc_score

    from x2dfd.crops import load_crops
    from x2dfd.detector import through_codec

    torch.set_num_threads(threads)
    known = load_crops(data)
    rows = sorted({int(i) for i in np.linspace(0, len(known.samples) - 1, limit)})
    size = float(known.crops.shape[1])
    faces = [
        Face(0, (0.0, 0.0, size, size), known.landmarks[i], 1.0, np.array(known.crops[i]), known.landmarks[i], 0.0)
        for i in rows
    ]
    faces = [replace(f, index=k) for k, f in enumerate(through_codec(faces))]
    fake = np.array([known.samples[i].label == "fake" for i in rows])
    if fake.all() or not fake.any():
        raise X2DFDError(f"{data}: real and fake pictures are needed", code="no_picture_of_label")
    ways = scorers(recipe)
    given, seconds = in_turns({name: score for name, (score, _) in ways.items()}, faces)
    sources = [known.samples[i].source for i in rows]
    scores = {name: probe(v, fake, sources) if v.ndim > 1 else v for name, v in given.items()}
    found = [
        Way(
            name,
            round(seconds[name], 4),
            round(size_mb, 1),
            round(float(roc_auc_score(fake, scores[name])), 4),
            len(rows),
        )
        for name, (_, size_mb) in ways.items()
    ]
    first, second = scores["verdict, fp32"], scores["verdict, bf16 products"]
    result = {"threads": threads, "ways": [asdict(w) for w in found]}
    result["bf16_moves_score_by_median"] = round(float(np.median(np.abs(first - second))), 5)
    write_text(out, json.dumps(result, indent=1) + "\n")
    write_text(out.with_suffix(".md"), table(found))
    plot(found, out.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    run_command(
        run, "Example:\n\n  python -m benchmarks.quality --data build/forged/manifest.jsonl --out build/quality.json"
    )

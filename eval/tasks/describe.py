"""Task `describe`: compares the rationale's cues with the known ones, and its text with reference texts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial

import numpy as np

from data_gen.writers import write_explanation
from eval import metrics as m
from eval import stats, texts
from eval.rows import Origin, Pair, SampleRow, score
from eval.scoring import Part, micro_f1, share, train_apart, unscored, value_of
from eval.stats import Measured
from eval.task import DECIDING, NO_ORIGIN, Outcome, Run, Task, judge_of
from eval.tasks.detect import JUDGED
from x2dfd.errors import X2DFDError
from x2dfd.explain import read_cues, said_label
from x2dfd.manifest import Sample
from x2dfd.types import Cue

REFERENCES = 3  # written for a sample that has none
MAX_QUESTIONS = 20  # questions of annotations, in the result

Compare = Callable[[Sequence[Sequence[str]], Sequence[str]], Part]
"""Text metrics of references and texts."""


def run(run: Run) -> Outcome:
    samples, all_samples = run.samples, run.every()
    if not any(s.cues or texts.references_of(s) for s in samples):
        raise X2DFDError(
            f"{run.manifest.name}: no chosen sample has known cues or references, nothing to describe",
            code="nothing_to_measure",
        )
    baselines = Baselines.of(all_samples, samples)
    with_references = sum(bool(texts.references_of(s)) for s in samples)
    questions: Counter[str] = Counter()
    for sample in samples:
        questions.update(texts.questions_of(sample))
    commonest = dict(sorted(questions.items(), key=lambda item: (-item[1], item[0]))[:MAX_QUESTIONS])
    notes: Part = {
        "skipped_fakes_without_cues": run.skipped,
        "majority_from": baselines.counted_in,
        "majority": None if baselines.usual is None else sorted(baselines.usual),
        "references": {
            "of_the_manifest": with_references,
            "annotations": {"questions": len(questions), "answers": questions.total(), "commonest": commonest},
            "written": sum(bool(references(s)) for s in samples) - with_references,
            "written_by": f"the grammar of data_gen.writers from the known cues, {REFERENCES} a sample: the embedded "
            "model was trained on its sentences, which flatters it",
        },
    }
    model = run.open()
    store = run.store()
    rows: list[SampleRow] = []
    origin: Origin = NO_ORIGIN
    if model.kind != "baseline":
        rows, origin = score(judge_of(run, model, rationale=True), samples, store)
    compare = partial(texts.text_metrics, encoder=run.options.sentence_encoder)
    measured = describe_result(samples, rows, baselines, compare)
    rows = rows or [SampleRow.of(s) for s in samples]
    return Outcome(store, rows, origin, notes | measured, model.name, model.mode, scores_of=DECIDING)


TASK = Task(
    "describe",
    "5",
    "image",
    "the rationale: cues against those known, text against reference texts",
    run,
    lambda s: s.label == "real" or bool(s.cues or texts.references_of(s)),
    "known cues or references",
)


@dataclass(frozen=True)
class Baselines:
    """Answers that need no picture."""

    usual: frozenset[Pair] | None  # the commonest cues of fakes; None where no cues are known
    counted_in: str | None
    template: dict[str, str]  # label -> its commonest text; this baseline is given the label

    @classmethod
    def of(cls, all_samples: Sequence[Sample], samples: Sequence[Sample]) -> Baselines:
        """Counted in the train split if there is one and none of it is judged; else in the judged samples."""
        train = train_apart(all_samples, samples)
        texts_by_label: dict[str, Counter[str]] = {"real": Counter(), "fake": Counter()}
        for sample in sorted(train or samples, key=lambda s: s.id):  # if all texts differ, the first by id counts
            texts_by_label[sample.label].update(references(sample)[:1])
        template = {label: counts.most_common(1)[0][0] if counts else "" for label, counts in texts_by_label.items()}
        if not any(s.cues for s in samples):
            return cls(None, None, template)
        train = [s for s in train if s.cues]
        cues = Counter(tuple(sorted(pairs_of(s.cues))) for s in (train or samples) if s.cues)
        usual = frozenset(min(cues.items(), key=lambda item: (-item[1], item[0]))[0])
        return cls(usual, "train split" if train else JUDGED, template)


def references(sample: Sample) -> list[str]:
    """A sample's reference texts in the manifest, else texts that the grammar writes from its known cues."""
    if given := texts.references_of(sample):
        return list(given)
    kind = "real" if sample.label == "real" else sample.df_class
    if not kind:  # the grammar closes with the class
        return []
    seed = int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8])
    return [
        write_explanation(sample.label, sample.cues, kind, np.random.default_rng([seed, k])) for k in range(REFERENCES)
    ]


def pairs_of(cues: Iterable[Cue]) -> frozenset[Pair]:
    return frozenset((c.area, c.artifact) for c in cues)


CueSets = Sequence[frozenset[Pair] | None]
"""The cues that a scorer names for each sample, None where it could not be judged."""


def describe_result(
    samples: Sequence[Sample], rows: Sequence[SampleRow], baselines: Baselines, compare: Compare
) -> Part:
    """How well the named cues agree with the known ones; without rows (no model), the baselines alone."""
    usual, template = baselines.usual, baselines.template
    by_template = {label: pairs_of(read_cues(text)) for label, text in template.items()}
    cue_sets: dict[str, CueSets] = {"majority": [usual] * len(samples)} if usual is not None else {}
    cue_sets |= {"template": [by_template[s.label] for s in samples]} | _model_cues(rows, usual is not None)
    scorers = {name: _agreement(samples, predicted, usual is not None) for name, predicted in cue_sets.items()}
    if "model" in scorers:
        scorers["model"] |= _texts(samples, rows)
    refs = [references(s) for s in samples]
    for name, lines in (("template", [template[s.label] for s in samples]), ("model", [r.rationale for r in rows])):
        if name in scorers:
            both = [i for i in range(len(samples)) if refs[i] and lines[i]]
            scorers[name]["text"] = {"n": len(both)} | compare([refs[i] for i in both], [lines[i] for i in both])
    headline: Part = {}
    for name, part in scorers.items():
        if usual is not None:
            headline |= {f"{name}.{what}_f1": part[what]["micro_f1"] for what in ("cues", "areas")}
            continue
        for metric in ("bleu_mean", "rouge_l"):
            headline[f"{name}.{metric}"] = Measured(part["text"].get(metric, {}).get("value"), n=part["text"]["n"])
    return {"headline": headline, "scorers": scorers}


def _model_cues(rows: Sequence[SampleRow], cues_are_known: bool) -> dict[str, CueSets]:
    """The cues that the model's texts name, and those that each expert pointed at, which the MLLM has read."""
    cue_sets: dict[str, CueSets] = {}
    if any(row.rationale for row in rows):  # without an MLLM there is no text
        cue_sets["model"] = [None if row.p_fake is None else frozenset(row.cues) for row in rows]
    for expert in sorted({name for row in rows for name in row.pointed if cues_are_known}):
        cue_sets[f"expert:{expert}"] = [
            None if row.p_fake is None else frozenset(row.pointed.get(expert, ())) for row in rows
        ]
    return cue_sets


def _agreement(samples: Sequence[Sample], predicted: CueSets, cues_are_known: bool) -> Part:
    """F1 of cues and areas on fakes, overall and by method, and how often cues were invented on reals."""
    has_truth = [s.label == "fake" and (bool(s.cues) or not cues_are_known) for s in samples]
    fakes = [i for i, cues in enumerate(predicted) if cues is not None and has_truth[i]]
    pairs = zip(predicted, samples, strict=True)
    reals = [(bool(cues), s.group) for cues, s in pairs if cues is not None and s.label == "real"]
    result: Part = {"n_scored": len(fakes) + len(reals), "n_fake": len(fakes), "n_real": len(reals)}
    if not cues_are_known:
        return result

    def agreement(chosen: Sequence[int], what: str) -> tuple[list[Set[object]], list[Set[object]], list[str]]:
        pairs = [(pairs_of(samples[i].cues), predicted[i] or frozenset()) for i in chosen]
        if what == "areas":
            pairs = [({area for area, _ in t}, {area for area, _ in p}) for t, p in pairs]  # type: ignore[misc]
        return [t for t, _ in pairs], [p for _, p in pairs], [samples[i].group for i in chosen]

    for what in ("cues", "areas"):
        truth, named, groups = agreement(fakes, what)
        result[what] = m.cue_agreement(truth, named) | {"micro_f1": micro_f1(truth, named, groups)}
    methods = {i: value_of(samples[i], "method") for i in fakes}
    result["by_method"] = {
        method: {"n": sum(other == method for other in methods.values())}
        | {what: micro_f1(*agreement([i for i in fakes if methods[i] == method], what)) for what in ("cues", "areas")}
        for method in sorted(set(methods.values()))
    }
    return result | {"invented_on_reals": stats.rate([hit for hit, _ in reals], [group for _, group in reals])}


def _texts(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """How many of the model's texts differ, contradict themselves, or name another label than the verdict."""
    with_score = [(s, row) for s, row in zip(samples, rows, strict=True) if row.p_fake is not None]
    labels = [(said_label(row.rationale), row.said, s.group) for s, row in with_score]
    conflicts = [(label != verdict, g) for label, verdict, g in labels if label and verdict != "inconclusive"]
    return {
        "unscored": unscored(rows, [row.p_fake for row in rows]),
        "without_text": sum(not row.rationale for _, row in with_score),
        "distinct_texts": m.distinct_share([row.rationale for row in rows if row.rationale]),
        "contradictions": share(with_score, lambda _, row: bool(row.contradictions)),
        "disagreement": stats.rate([hit for hit, _ in conflicts], [g for _, g in conflicts]),
    }

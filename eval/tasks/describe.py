"""Task `describe`: the rationale, its cues against those known, and its text against reference texts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial

import numpy as np

from eval import metrics as m
from eval import stats, texts
from eval.rows import Origin, Pair, SampleRow, score
from eval.scoring import Part, micro_f1, train_apart, unscored, value_of
from eval.stats import Measured
from eval.task import DECIDING, NO_ORIGIN, Made, Run, Task, judge_of
from eval.tasks.detect import JUDGED
from x2dfd.errors import X2DFDError
from x2dfd.explain import read_cues, said_label
from x2dfd.manifest import Sample
from x2dfd.types import Cue

REFERENCES = 3  # written for a sample that brings none
SHOWN = 20  # questions of annotations, in the result

Compare = Callable[[Sequence[Sequence[str]], Sequence[str]], Part]
"""Text metrics of references and texts."""


def run(run: Run) -> Made:
    samples, every = run.samples, run.every()
    if not any(s.cues or texts.references_of(s) for s in samples):
        raise X2DFDError(
            f"{run.manifest.name}: no chosen sample has known cues or references, nothing to describe",
            code="nothing_to_measure",
        )
    baselines = Baselines.of(every, samples)
    own = sum(bool(texts.references_of(s)) for s in samples)
    asked: Counter[str] = Counter()
    for sample in samples:
        asked.update(texts.questions_of(sample))
    commonest = dict(sorted(asked.items(), key=lambda item: (-item[1], item[0]))[:SHOWN])
    notes: Part = {
        "skipped_fakes_without_cues": run.skipped,
        "majority_from": baselines.counted_in,
        "majority": None if baselines.usual is None else sorted(baselines.usual),
        "references": {
            "of_the_manifest": own,
            "annotations": {"questions": len(asked), "answers": asked.total(), "commonest": commonest},
            "written": sum(bool(references(s)) for s in samples) - own,
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
    return Made(store, rows, origin, notes | measured, model.name, model.mode, scores_of=DECIDING)


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
    """What is said without a look at the picture."""

    usual: frozenset[Pair] | None  # the commonest cues of fakes; None where no cues are known
    counted_in: str | None
    template: dict[str, str]  # label -> its commonest text; this baseline is given the label

    @classmethod
    def of(cls, every: Sequence[Sample], samples: Sequence[Sample]) -> Baselines:
        """Counted in the train split, where there is one apart; else in the judged samples."""
        train = train_apart(every, samples)
        counted: dict[str, Counter[str]] = {"real": Counter(), "fake": Counter()}
        for sample in sorted(train or samples, key=lambda s: s.id):  # where all texts differ, the first by id
            counted[sample.label].update(references(sample)[:1])
        template = {label: found.most_common(1)[0][0] if found else "" for label, found in counted.items()}
        if not any(s.cues for s in samples):
            return cls(None, None, template)
        train = [s for s in train if s.cues]
        cues = Counter(tuple(sorted(pairs_of(s.cues))) for s in (train or samples) if s.cues)
        usual = frozenset(min(cues.items(), key=lambda item: (-item[1], item[0]))[0])
        return cls(usual, "train split" if train else JUDGED, template)


def references(sample: Sample) -> list[str]:
    """A sample's reference texts; where the manifest has none, texts that the grammar writes of its known cues."""
    from data_gen.writers import write_explanation

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


Said = Sequence[frozenset[Pair] | None]
"""The cues that are said of each sample, None where it could not be judged."""


def describe_result(
    samples: Sequence[Sample], rows: Sequence[SampleRow], baselines: Baselines, compare: Compare
) -> Part:
    """Agreement of the cues said with the cues known; without rows (no model), the baselines alone."""
    usual, template = baselines.usual, baselines.template
    by_template = {label: pairs_of(read_cues(text)) for label, text in template.items()}
    said: dict[str, Said] = {"majority": [usual] * len(samples)} if usual is not None else {}
    said |= {"template": [by_template[s.label] for s in samples]} | _said_by(rows, usual is not None)
    scorers = {name: _agreement(samples, heard, usual is not None) for name, heard in said.items()}
    if "model" in scorers:
        scorers["model"] |= _texts(samples, rows)
    told = [references(s) for s in samples]
    for name, line in (("template", [template[s.label] for s in samples]), ("model", [r.rationale for r in rows])):
        if name in scorers:
            kept = [i for i in range(len(samples)) if told[i] and line[i]]
            scorers[name]["text"] = {"n": len(kept)} | compare([told[i] for i in kept], [line[i] for i in kept])
    headline: Part = {}
    for name, part in scorers.items():
        if usual is not None:
            headline |= {f"{name}.{what}_f1": part[what]["micro_f1"] for what in ("cues", "areas")}
            continue
        for metric in ("bleu_mean", "rouge_l"):
            headline[f"{name}.{metric}"] = Measured(part["text"].get(metric, {}).get("value"), n=part["text"]["n"])
    return {"headline": headline, "scorers": scorers}


def _said_by(rows: Sequence[SampleRow], cues_are_known: bool) -> dict[str, Said]:
    """What the model's text names and, beside it, what each expert had pointed at: the MLLM has read that."""
    said: dict[str, Said] = {}
    if any(row.rationale for row in rows):  # without an MLLM there is no text
        said["model"] = [None if row.p_fake is None else frozenset(row.cues) for row in rows]
    for expert in sorted({name for row in rows for name in row.pointed if cues_are_known}):
        said[f"expert:{expert}"] = [
            None if row.p_fake is None else frozenset(row.pointed.get(expert, ())) for row in rows
        ]
    return said


def _agreement(samples: Sequence[Sample], said: Said, cues_are_known: bool) -> Part:
    """Of fakes, cues and areas against those known, by method too; of reals, how often cues were invented."""
    known = [s.label == "fake" and (bool(s.cues) or not cues_are_known) for s in samples]
    kept = [i for i, cues in enumerate(said) if cues is not None and known[i]]
    pairs_said = zip(said, samples, strict=True)
    reals = [(bool(cues), s.group) for cues, s in pairs_said if cues is not None and s.label == "real"]
    result: Part = {"n_scored": len(kept) + len(reals), "n_fake": len(kept), "n_real": len(reals)}
    if not cues_are_known:
        return result

    def agreement(chosen: Sequence[int], what: str) -> tuple[list[Set[object]], list[Set[object]], list[str]]:
        pairs = [(pairs_of(samples[i].cues), said[i] or frozenset()) for i in chosen]
        if what == "areas":
            pairs = [({area for area, _ in t}, {area for area, _ in s}) for t, s in pairs]  # type: ignore[misc]
        return [t for t, _ in pairs], [s for _, s in pairs], [samples[i].group for i in chosen]

    for what in ("cues", "areas"):
        truth, heard, groups = agreement(kept, what)
        result[what] = m.cue_agreement(truth, heard) | {"micro_f1": micro_f1(truth, heard, groups)}
    methods = {i: value_of(samples[i], "method") for i in kept}
    result["by_method"] = {
        method: {"n": sum(own == method for own in methods.values())}
        | {what: micro_f1(*agreement([i for i in kept if methods[i] == method], what)) for what in ("cues", "areas")}
        for method in sorted(set(methods.values()))
    }
    return result | {"invented_on_reals": stats.rate([hit for hit, _ in reals], [group for _, group in reals])}


def _texts(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """Of the model's texts: how many differ, contradict themselves, or say another label than the verdict."""
    with_score = [(row, s.group) for row, s in zip(rows, samples, strict=True) if row.p_fake is not None]
    labels = [(said_label(row.rationale), row.said, group) for row, group in with_score]
    apart = [(own != verdict, g) for own, verdict, g in labels if own and verdict != "inconclusive"]
    return {
        "unscored": unscored(rows, [row.p_fake for row in rows]),
        "without_text": sum(not row.rationale for row, _ in with_score),
        "distinct_texts": m.distinct_share([row.rationale for row in rows if row.rationale]),
        "contradictions": stats.rate([bool(row.contradictions) for row, _ in with_score], [g for _, g in with_score]),
        "disagreement": stats.rate([hit for hit, _ in apart], [g for _, g in apart]),
    }

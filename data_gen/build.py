"""`python -m data_gen build`: from the ranking and the forgeries' truth to LLaVA-format instruction data.

Explanations name strong cues (assessment) that are truly there (forge): SFS. Questions give expert scores: WFS,
with a set share of them missing or wrong, so that no single expert is obeyed blindly. Every record carries its truth.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_gen.exchange import FORMATS
from data_gen.exchange import write as export
from data_gen.questions import cue_questions
from data_gen.writers import (
    class_answer,
    class_choices,
    decision_question,
    distinct_n,
    kind_question,
    write_explanation,
    write_follow_up,
)
from x2dfd import prompts
from x2dfd.assessment import CueQuestion, read_assessment, strong_cues
from x2dfd.crops import CropSet, load_crops
from x2dfd.detector import through_codec
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.experts import DEFAULT, Expert, Shared, card_of, load_expert
from x2dfd.faces import CROP_SIZE
from x2dfd.files import Json, file_sha256, whole, write_text
from x2dfd.manifest import Sample
from x2dfd.progress import progress
from x2dfd.tower import HEAD_LAYERS, VIEWS, TowerFeatures, cached_features, training_rows, view_face
from x2dfd.types import AREAS, ARTIFACTS, Evidence


@dataclass(frozen=True)
class BuildConfig:
    """What an instruction set is made of; saved in its data card."""

    data: str  # manifest of forgeries with cues (data_gen forge)
    assessment: str | None = None  # assessment.json; without one every cue counts as strong
    experts: tuple[str, ...] = DEFAULT  # in prompt order
    score_form: str = "numbers"  # how questions give scores, of x2dfd.prompts.SCORE_FORMS
    expert_weights: str | None = None  # folder of other weights than the experts' own
    features: str | None = None  # folder for the forensic tower's outputs, which `finetune` takes as cached_features
    held_out: tuple[str, ...] = ()  # forge methods kept out of training, for figures on held-out methods
    view_seed: int = 1  # the degradation of each picture; the cached tower features use the same
    corrupt: float = 0.15  # share of injected scores that are wrong or missing in training
    closing: bool = True  # explanations end in a sentence on the experts that agree, as X2-DFD's do
    explanations: int = 1  # verdicts with an explanation per fake with known cues: other words, other wrong scores
    cue_questions: int = 2  # yes/no questions per picture
    follow_ups: float = 0.35  # share of pictures with a second turn after the verdict
    limit: int | None = None  # at most this many pictures, drawn by their ids
    format: str | None = None  # written as another stack trains on it too, of data_gen.exchange.FORMATS
    crop_size: int = CROP_SIZE  # side of the pictures that are written with `format`
    seed: int = 0


def build(config: BuildConfig, out: Path) -> Path:
    """Write `instructions.jsonl`, a Parquet copy, and `card.json` with counts into `out`; returns the JSONL's path.
    Raises X2DFDError for a fake of unknown class, or when nothing is left to build from, and UnknownName for a
    format."""
    if config.format is not None and config.format not in FORMATS:
        raise UnknownName("format", config.format, FORMATS)
    if not 0 <= config.corrupt <= 1:
        raise X2DFDError(f"corrupt must be a share from 0 to 1, not {config.corrupt}", code="share_out_of_range")
    data = load_crops(Path(config.data), side=config.crop_size)
    strong = _explained(config)
    rows = [int(i) for i in training_rows(data, config.limit)]
    unclear = [data.samples[i].id for i in rows if data.samples[i].label == "fake" and not data.samples[i].df_class]
    if unclear:
        raise X2DFDError(
            f"{config.data}: {len(unclear)} fakes without df_class, such as {unclear[0]}", code="df_class_missing"
        )
    scores = expert_scores(data, rows, config)
    kept = [
        i
        for i in rows
        if data.samples[i].split != "train" or not set(data.samples[i].method.split("+")) & set(config.held_out)
    ]
    records: list[Json] = []
    for i in kept:
        sample = data.samples[i]
        rng = np.random.default_rng([config.seed, i])
        records += list(_records(sample, i, scores[sample.id], strong, config, rng))
    if not records:
        raise X2DFDError(f"{config.data}: no usable picture of split train, val or calib", code="no_usable_picture")
    if config.assessment is not None:  # what was explained is part of the set
        write_text(out / "assessment.json", Path(config.assessment).read_text(encoding="utf-8"))
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    write_text(out / "instructions.jsonl", text)
    _write_parquet(out / "instructions.parquet", records)
    write_text(out / "card.json", json.dumps(data_card(records, config, out), indent=1, ensure_ascii=False) + "\n")
    if config.format is not None:
        export(records, data, config.view_seed, out, config.format)
    return out / "instructions.jsonl"


def _explained(config: BuildConfig) -> set[tuple[str, str]] | None:
    """The cues that explanations may name: the ranking's strong ones (SFS), and those that an expert of the prompt
    covers and so points at (WFS); None without a ranking: all of them."""
    if config.assessment is None:
        return None
    weights = Path(config.expert_weights) if config.expert_weights else None
    asked = [load_expert(name, weights).card for name in config.experts]
    pairs = {(area, artifact) for area in AREAS for artifact in ARTIFACTS}
    covered = {(a, r) for a, r in pairs if any(card.covers_cue(a, r) for card in asked)}
    return set(strong_cues(read_assessment(Path(config.assessment)))) | covered


def expert_scores(data: CropSet, rows: Sequence[int], config: BuildConfig) -> dict[str, list[Evidence]]:
    """Each expert's evidence about each sample's augmented view: sample id -> evidence in prompt order."""
    table: dict[str, list[Evidence]] = {data.samples[i].id: [] for i in rows}
    weights = Path(config.expert_weights) if config.expert_weights else None
    if weights is not None and not any((weights / f"{name}.card.json").is_file() for name in config.experts):
        raise X2DFDError(f"{weights} holds no card of {', '.join(config.experts)}", code="expert_card_missing")
    for name in config.experts:
        expert = load_expert(name, weights)
        passed = _passed(data, rows, config, expert) if name == "tower" else None
        tower: str = getattr(expert, "tower", "")
        for start in progress(range(0, len(rows), 16), f"{name} scores"):
            part = rows[start : start + 16]
            faces = through_codec([view_face(data, i, config.view_seed) for i in part])
            shared = Shared(passed.states(slice(start, start + 16)), tower) if passed else None
            for i, evidence in zip(part, expert.judge(faces, shared), strict=True):
                table[data.samples[i].id].append(evidence)
    return table


def _passed(data: CropSet, rows: Sequence[int], config: BuildConfig, expert: Expert) -> TowerFeatures | None:
    """The forensic tower's one pass over the augmented views, kept to train the MLLM where that is asked for."""
    if config.features is None:
        return None
    from external_detectors.tower import WEIGHTS

    additions = Path(config.expert_weights or WEIGHTS) / expert.card.weights
    layers = max(HEAD_LAYERS)
    return cached_features(
        data, np.array(rows), Path(config.features), layers, HEAD_LAYERS, config.view_seed, additions=additions
    )


def _records(
    sample: Sample,
    index: int,
    evidence: list[Evidence],
    strong: set[tuple[str, str]] | None,
    config: BuildConfig,
    rng: np.random.Generator,
) -> Iterator[Json]:
    """The conversations about one picture: verdict with scores, without, in a user's words, class, yes/no questions, a
    follow-up."""
    # An explanation names cues that are there and that the model can see.
    cues = [c for c in sample.cues if strong is None or (c.area, c.artifact) in strong]
    label = sample.label
    df_class = sample.df_class or "real"
    common = {
        "image": sample.id,
        "row": index,
        "label": label,
        "df_class": df_class,
        "cues": [asdict(c) for c in sample.cues],
        "mask": str(sample.mask) if sample.mask else None,
        "dataset": sample.source,
        "licence": str(sample.extra.get("licence") or "not stated"),
        "group": sample.group,
        "split": sample.split,
        "method": sample.method,
    }
    shown: list[Evidence] = []

    def record(task: str, question: str, answer: str, *follow_up: str) -> Json:
        said = [f"<image>\n{question}", answer, *follow_up]
        turns = [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(said)]
        told = {
            "scores": {e.expert: e.score for e in shown},
            "pointed": {e.expert: [asdict(c) for c in e.cues] for e in shown if e.cues},
        }
        return {"id": f"{sample.id}/{task}", "task": task, **common, **told, "conversations": turns}

    for number in range(config.explanations if label == "fake" and cues else 1):
        shown = corrupted(evidence, config.corrupt, rng) if sample.split == "train" else evidence
        pointed = [c for e in shown for c in e.cues] if label == "real" else []
        explanation = write_explanation(label, tuple(cues), df_class, rng, pointed)
        question = prompts.verdict_question(shown, config.score_form)
        answer = prompts.verdict_answer(label, explanation, shown if config.closing else ())
        yield record("detect" if number == 0 else f"detect_again{number}", question, answer)
    yield record("detect_plain", prompts.QUESTION, prompts.verdict_answer(label))
    told = prompts.expert_block(shown, config.score_form)
    yield record("detect_asked", decision_question(rng) + told, prompts.verdict_answer(label))
    yield record("classify", prompts.CLASS_QUESTION + class_choices(rng) + told, class_answer(df_class, rng))
    asked = _cue_questions(sample, config.cue_questions, rng)
    for number, (cue_question, yes) in enumerate(asked):
        yield record(f"cue{number}", cue_question.text, "Yes" if yes else "No")
    for number in range(max(0, config.cue_questions - len(asked)) or int(rng.random() < 0.3)):
        kind, yes = kind_question(df_class, rng)
        yield record(f"kind{number}", f"{kind} {prompts.CUE_ENDING}", "Yes" if yes else "No")
    if rng.random() < config.follow_ups:
        said = write_follow_up(label, cues, df_class, rng, [c.area for c in sample.cues])
        yield record("chat", question, answer, *said)


def _cue_questions(sample: Sample, count: int, rng: np.random.Generator) -> list[tuple[CueQuestion, bool]]:
    """Questions about cues that are there (up to half) and about cues that are not."""
    if sample.label == "fake" and not sample.cues:
        return []  # nobody knows what a ready-made fake shows
    there = {(c.area, c.artifact) for c in sample.cues if (c.score or 0) >= 0.2}
    touched = {(c.area, c.artifact) for c in sample.cues}
    yes = [q for q in cue_questions() if (q.area, q.artifact) in there]
    no = [q for q in cue_questions() if (q.area, q.artifact) not in touched]
    chosen = [(yes[int(k)], True) for k in rng.permutation(len(yes))[: count // 2]]
    chosen += [(no[int(k)], False) for k in rng.permutation(len(no))[: count - len(chosen)]]
    return chosen


def corrupted(evidence: Sequence[Evidence], rate: float, rng: np.random.Generator) -> list[Evidence]:
    """Each score, with probability `rate`, is missing or drawn at random; what the expert points at goes with it."""
    out = []
    for e in evidence:
        if rng.random() < rate:
            e = Evidence(e.expert, None, "left out") if rng.random() < 0.5 else Evidence(e.expert, float(rng.random()))
        out.append(e)
    return out


def _write_parquet(path: Path, records: Sequence[Json]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = [
        {**r, "cues": json.dumps(r["cues"]), "scores": json.dumps(r["scores"]), "pointed": json.dumps(r["pointed"])}
        for r in records
    ]
    with whole(path) as temporary:
        pq.write_table(pa.Table.from_pylist(flat), temporary)


def data_card(records: Sequence[Json], config: BuildConfig, out: Path) -> Json:
    """Data card: counts per task, split, source, licence, label, method, class and cue; how varied the texts are."""
    main = [r for r in records if r["task"] == "detect"]
    answers = [r["conversations"][1]["value"] for r in main]

    weights = Path(config.expert_weights) if config.expert_weights else None

    def count(key: str) -> dict[str, int]:
        return dict(sorted(Counter(str(r[key]) for r in main).items()))

    cues = Counter(f"{c['area']} x {c['artifact']}" for r in main for c in r["cues"])
    return {
        "config": asdict(config),
        "manifest_sha256": file_sha256(Path(config.data)),
        "views": VIEWS,
        "instructions_sha256": file_sha256(out / "instructions.jsonl"),
        "assessment_sha256": file_sha256(out / "assessment.json") if config.assessment else None,
        "experts": {name: card_of(name, weights).sha256 for name in config.experts},  # in the order of the prompt
        "pictures": len(main),
        "records": dict(sorted(Counter(r["task"].rstrip("0123456789") for r in records).items())),
        "split": count("split"),
        "label": count("label"),
        "dataset": count("dataset"),
        "licence": count("licence"),
        "method": count("method"),
        "df_class": count("df_class"),
        "cues": dict(cues.most_common()),
        "distinct_answers": round(len(set(answers)) / max(1, len(answers)), 4),
        "distinct_3": round(distinct_n(answers, 3), 4),
    }

"""`python -m data_gen build`: LLaVA-format instruction data from the ranking of cues and the truth about forgeries.

Explanations name cues that the assessment found strong and that the forge really made (SFS). Questions give expert
scores (WFS), and a set share of them is missing or wrong, so that the model obeys no single expert blindly. Every
record carries the truth about its picture.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
from x2dfd.files import Json, atomic_write, file_sha256, write_text
from x2dfd.manifest import Sample
from x2dfd.progress import progress
from x2dfd.tower import HEAD_LAYERS, VIEWS, TowerFeatures, cached_features, training_rows, view_face
from x2dfd.types import AREAS, ARTIFACTS, Evidence


@dataclass(frozen=True)
class BuildConfig:
    """The settings of an instruction set; saved in its data card."""

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
    explanations: int = 1  # explained verdicts per fake with known cues; each has other words and other wrong scores
    cue_questions: int = 2  # yes/no questions per picture
    follow_ups: float = 0.35  # share of pictures with a second turn after the verdict
    limit: int | None = None  # at most this many pictures, drawn by their ids
    format: str | None = None  # also write it in this format of another stack, of data_gen.exchange.FORMATS
    crop_size: int = CROP_SIZE  # side of the pictures that are written with `format`
    seed: int = 0

    @property
    def weights(self) -> Path | None:
        """`expert_weights` as a path."""
        return Path(self.expert_weights) if self.expert_weights else None


def build(config: BuildConfig, out: Path) -> Path:
    """Write `instructions.jsonl`, a Parquet copy, and `card.json` with counts into `out`; returns the JSONL's path.

    Pictures without a usable face are left out; a line on stderr and the card say how many. Raises X2DFDError for a
    fake of unknown class, or when nothing is left to build from, and UnknownName for a format.
    """
    if config.format is not None and config.format not in FORMATS:
        raise UnknownName("format", config.format, FORMATS)
    if not 0 <= config.corrupt <= 1:
        raise X2DFDError(f"corrupt must be a share from 0 to 1, not {config.corrupt}", code="share_out_of_range")
    data = load_crops(Path(config.data), side=config.crop_size)
    if lost := data.lost():
        print(lost, file=sys.stderr)
    strong = _explainable_cues(config)
    rows = [int(i) for i in training_rows(data, config.limit)]
    unclear = [data.samples[i].id for i in rows if data.samples[i].label == "fake" and not data.samples[i].df_class]
    if unclear:
        raise X2DFDError(
            f"{config.data}: {len(unclear)} fakes without df_class, such as {unclear[0]}", code="df_class_missing"
        )
    scores = expert_scores(data, rows, config)
    selected = [
        i
        for i in rows
        if data.samples[i].split != "train" or not set(data.samples[i].method.split("+")) & set(config.held_out)
    ]
    records: list[Json] = []
    for i in selected:
        sample = data.samples[i]
        rng = np.random.default_rng([config.seed, i])
        records += list(_records(sample, i, scores[sample.id], strong, config, rng))
    if not records:
        raise X2DFDError(f"{config.data}: no usable picture of split train, val or calib", code="no_usable_picture")
    if config.assessment is not None:  # the set includes the ranking that chose its explanations
        write_text(out / "assessment.json", Path(config.assessment).read_text(encoding="utf-8"))
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    write_text(out / "instructions.jsonl", text)
    _write_parquet(out / "instructions.parquet", records)
    card = data_card(records, config, out) | {"without_a_face": len(data.unusable)}
    write_text(out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    if config.format is not None:
        export(records, data, config.view_seed, out, config.format)
    return out / "instructions.jsonl"


def _explainable_cues(config: BuildConfig) -> set[tuple[str, str]] | None:
    """The cues that explanations may name: strong ones of the ranking (SFS) and those that an expert of the prompt
    covers (WFS). None without a ranking, which means all."""
    if config.assessment is None:
        return None
    cards = [load_expert(name, config.weights).card for name in config.experts]
    pairs = {(area, artifact) for area in AREAS for artifact in ARTIFACTS}
    covered = {(a, r) for a, r in pairs if any(card.covers_cue(a, r) for card in cards)}
    return set(strong_cues(read_assessment(Path(config.assessment)))) | covered


def expert_scores(data: CropSet, rows: Sequence[int], config: BuildConfig) -> dict[str, list[Evidence]]:
    """Each expert's evidence about each sample's augmented view: sample id -> evidence in prompt order."""
    table: dict[str, list[Evidence]] = {data.samples[i].id: [] for i in rows}
    weights = config.weights
    if weights is not None and not any((weights / f"{name}.card.json").is_file() for name in config.experts):
        raise X2DFDError(f"{weights} holds no card of {', '.join(config.experts)}", code="expert_card_missing")
    for name in config.experts:
        expert = load_expert(name, weights)
        features = _tower_features(data, rows, config, expert) if name == "tower" else None
        tower: str = getattr(expert, "tower", "")
        for start in progress(range(0, len(rows), 16), f"{name} scores"):
            batch = rows[start : start + 16]
            faces = through_codec([view_face(data, i, config.view_seed) for i in batch])
            shared = Shared(features.states(slice(start, start + 16)), tower) if features else None
            for i, evidence in zip(batch, expert.judge(faces, shared), strict=True):
                table[data.samples[i].id].append(evidence)
    return table


def _tower_features(data: CropSet, rows: Sequence[int], config: BuildConfig, expert: Expert) -> TowerFeatures | None:
    """The forensic tower's outputs for the augmented views, cached for the MLLM's training; None without `features`."""
    if config.features is None:
        return None
    from external_detectors.tower import WEIGHTS

    additions = (config.weights or WEIGHTS) / expert.card.weights
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
    """The conversations about one picture: verdicts with and without scores, a verdict in a user's words, its class,
    yes/no questions, a follow-up."""
    # An explanation names cues that the picture has and that the model can see.
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
    prompt_evidence: list[Evidence] = []

    def record(task: str, question: str, answer: str, *follow_up: str) -> Json:
        texts = [f"<image>\n{question}", answer, *follow_up]
        turns = [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(texts)]
        experts = {
            "scores": {e.expert: e.score for e in prompt_evidence},
            "pointed": {e.expert: [asdict(c) for c in e.cues] for e in prompt_evidence if e.cues},
        }
        return {"id": f"{sample.id}/{task}", "task": task, **common, **experts, "conversations": turns}

    for number in range(config.explanations if label == "fake" and cues else 1):
        prompt_evidence = corrupted(evidence, config.corrupt, rng) if sample.split == "train" else evidence
        pointed = [c for e in prompt_evidence for c in e.cues] if label == "real" else []
        explanation = write_explanation(label, tuple(cues), df_class, rng, pointed)
        question = prompts.verdict_question(prompt_evidence, config.score_form)
        answer = prompts.verdict_answer(label, explanation, prompt_evidence if config.closing else ())
        yield record("detect" if number == 0 else f"detect_again{number}", question, answer)
    yield record("detect_plain", prompts.QUESTION, prompts.verdict_answer(label))
    block = prompts.expert_block(prompt_evidence, config.score_form)
    yield record("detect_asked", decision_question(rng) + block, prompts.verdict_answer(label))
    yield record("classify", prompts.CLASS_QUESTION + class_choices(rng) + block, class_answer(df_class, rng))
    questions = _cue_questions(sample, config.cue_questions, rng)
    for number, (cue_question, yes) in enumerate(questions):
        yield record(f"cue{number}", cue_question.text, "Yes" if yes else "No")
    for number in range(max(0, config.cue_questions - len(questions)) or int(rng.random() < 0.3)):
        kind, yes = kind_question(df_class, rng)
        yield record(f"kind{number}", f"{kind} {prompts.CUE_ENDING}", "Yes" if yes else "No")
    if rng.random() < config.follow_ups:
        follow_up = write_follow_up(label, cues, df_class, rng, [c.area for c in sample.cues])
        yield record("chat", question, answer, *follow_up)


def _cue_questions(sample: Sample, count: int, rng: np.random.Generator) -> list[tuple[CueQuestion, bool]]:
    """Questions about cues that the picture has (up to half) and about cues that it does not have."""
    if sample.label == "fake" and not sample.cues:
        return []  # the cues of a ready-made fake are unknown
    visible = {(c.area, c.artifact) for c in sample.cues if (c.score or 0) >= 0.2}
    present = {(c.area, c.artifact) for c in sample.cues}
    positive = [q for q in cue_questions() if (q.area, q.artifact) in visible]
    negative = [q for q in cue_questions() if (q.area, q.artifact) not in present]
    chosen = [(positive[int(k)], True) for k in rng.permutation(len(positive))[: count // 2]]
    chosen += [(negative[int(k)], False) for k in rng.permutation(len(negative))[: count - len(chosen)]]
    return chosen


def corrupted(evidence: Sequence[Evidence], rate: float, rng: np.random.Generator) -> list[Evidence]:
    """With probability `rate`, a score is missing or drawn at random, without the cues that its expert points at."""
    out = []
    for e in evidence:
        if rng.random() < rate:
            e = Evidence(e.expert, None, "left out") if rng.random() < 0.5 else Evidence(e.expert, float(rng.random()))
        out.append(e)
    return out


def _write_parquet(path: Path, records: Sequence[Json]) -> None:
    flat = [r | {key: json.dumps(r[key]) for key in ("cues", "scores", "pointed")} for r in records]
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist(flat), temporary)


def data_card(records: Sequence[Json], config: BuildConfig, out: Path) -> Json:
    """Data card: counts per task, split, source, licence, label, method, class and cue, and variety of the texts."""
    verdicts = [r for r in records if r["task"] == "detect"]
    answers = [r["conversations"][1]["value"] for r in verdicts]
    counts = {
        key: dict(sorted(Counter(str(r[key]) for r in verdicts).items()))
        for key in ("split", "label", "dataset", "licence", "method", "df_class")
    }
    cues = Counter(f"{c['area']} x {c['artifact']}" for r in verdicts for c in r["cues"])
    return {
        "config": asdict(config),
        "manifest_sha256": file_sha256(Path(config.data)),
        "views": VIEWS,
        "instructions_sha256": file_sha256(out / "instructions.jsonl"),
        "assessment_sha256": file_sha256(out / "assessment.json") if config.assessment else None,
        "experts": {name: card_of(name, config.weights).sha256 for name in config.experts},  # in the prompt's order
        "pictures": len(verdicts),
        "records": dict(sorted(Counter(r["task"].rstrip("0123456789") for r in records).items())),
        **counts,
        "cues": dict(cues.most_common()),
        "distinct_answers": round(len(set(answers)) / max(1, len(answers)), 4),
        "distinct_3": round(distinct_n(answers, 3), 4),
    }

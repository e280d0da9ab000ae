"""Conversations of another stack as an instruction set of ours: faces aligned as in use, one row for each picture."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Literal

from data_gen.build import BuildConfig, data_card
from data_gen.exchange import MARK, Record, read, task_of
from x2dfd import prompts
from x2dfd.crops import load_crops
from x2dfd.errors import InputError, X2DFDError
from x2dfd.experts import aliased
from x2dfd.faces import find_faces
from x2dfd.files import write_text
from x2dfd.manifest import Sample, write_manifest
from x2dfd.media import load_picture

SCORED = re.compile(r"\bthe [\w -]+ score is\b", re.IGNORECASE)
"""A question that gives an expert's score."""


def adopt(path: Path, out: Path, *, pictures: Path | None = None, experts: str = "") -> Path:
    """Write the conversations of `path` (a format of `exchange`) as `data_gen build` writes its own; returns the JSONL.

    `out` gets `instructions.jsonl` with a record for each answer, `card.json` and `manifest.jsonl`, all of split
    `train`. A picture's label is the verdict that an answer begins with, or its records' `label`. `pictures` is as in
    `exchange.read`; `experts` names the experts whose scores the questions give, as in `x2dfd.experts.aliased`. A
    conversation about several pictures or none is of task `talk`, and the manifest does not list its pictures. The card
    counts pictures without a usable face. Raises X2DFDError for a conversation that does not fit the prompts.
    """
    records = read(path, pictures)
    names, aliases = aliased(experts)
    answers_of: dict[str, list[list[dict[str, str]]]] = {}  # by picture: a conversation for each answer, its last turn
    labels_of: dict[str, set[str]] = {}
    talks: list[Record] = []
    for record in records:
        if reason := _unfit(record, bool(names)):
            raise X2DFDError(f"{path}, record {record['id']}: {reason}", code="conversation_unfit")
        turns = [dict(turn) for turn in record["conversations"]]
        if len(record["images"]) != 1 or MARK not in turns[0]["value"]:
            talks += _talk(record, turns)
            continue
        turns[0]["value"] = f"{MARK}\n{turns[0]['value'].replace(MARK, '').strip()}"
        image = os.path.realpath(record["images"][0])
        answers_of.setdefault(image, []).extend(turns[:end] for end in range(2, len(turns) + 1, 2))
        labels_of.setdefault(image, set()).update({record["label"]} - {""})
    samples = [
        Sample(f"{k:06d}", Path(image), _label(path, image, labels_of[image], answers), source=path.stem, split="train")
        for k, (image, answers) in enumerate(answers_of.items())
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "manifest.jsonl", "")
    if samples:
        write_manifest(out / "manifest.jsonl", samples)
    data = load_crops(out / "manifest.jsonl") if samples else None
    has_face = {image: _has_face(image) for talk in talks for image in talk["images"]}
    output: list[Record] = [talk for talk in talks if all(has_face[image] for image in talk["images"])]
    if not output and data is None:
        raise X2DFDError(f"{path}: none of the pictures shows a usable face", code="no_usable_face")
    for row, sample in enumerate(data.samples if data else ()):
        rest = {"row": row, "label": sample.label, "split": sample.split, "dataset": path.stem, "licence": "not stated"}
        for k, turns in enumerate(answers_of[str(sample.path)]):
            ids = {"id": f"{sample.id}/{k}", "task": task_of(turns[-1]["value"]), "image": sample.id}
            output.append(ids | rest | {"df_class": "", "method": "", "cues": [], "conversations": turns})
    write_text(out / "instructions.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in output))
    card = data_card(output, BuildConfig(data=str(out / "manifest.jsonl"), experts=names), out)
    card |= {"from": path.name, "aliases": aliases, "without_a_face": len(data.unusable) if data else 0}
    card["without_a_face"] += sum(not usable for usable in has_face.values())
    write_text(out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return out / "instructions.jsonl"


def _talk(record: Record, turns: list[dict[str, str]]) -> list[Record]:
    """A record for each answer of a conversation that is not about one picture from its first question on."""
    images = [os.path.realpath(image) for image in record["images"]]
    records: list[Record] = []
    for k, end in enumerate(range(2, len(turns) + 1, 2)):
        n_images = sum(turn["value"].count(MARK) for turn in turns[:end])
        ids = {"id": f"{record['id']}/{k}", "task": "talk", "split": "train", "images": images[:n_images]}
        records.append(ids | {"conversations": turns[:end]})
    return records


def _has_face(path: str) -> bool:
    try:
        return bool(find_faces(load_picture(path).pixels))
    except InputError:  # as in x2dfd.crops: a file that cannot be read has no usable face
        return False


def _unfit(record: Record, has_experts: bool) -> str:
    """The reason for refusing a conversation as training data, or ""."""
    questions = [turn["value"] for turn in record["conversations"][::2]]
    if record["system"]:
        return "it has a system prompt, which the prompts of x2dfd do not have"
    if not has_experts and any(SCORED.search(question) for question in questions):
        return "its question states experts' scores: name these experts with --experts ALIAS=NAME"
    return ""


def _label(path: Path, image: str, labels: set[str], answers: list[list[dict[str, str]]]) -> Literal["real", "fake"]:
    """The label on which the given ones and the answers of a picture agree. Raises X2DFDError where they do not."""
    for answer in (turns[-1]["value"] for turns in answers):
        labels = labels | {word.strip() for word in prompts.LABEL_WORDS if answer.startswith(prompts.STEM + word)}
    if labels == {"real"}:
        return "real"
    if labels == {"fake"}:
        return "fake"
    verdicts = ", ".join(sorted(labels)) or "no verdict, and no `label`"
    raise X2DFDError(
        f"{path}: the answers about {image} must all call it real, or all fake; found: {verdicts}", code="label_unclear"
    )

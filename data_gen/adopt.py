"""Conversations of another stack as an instruction set of ours: faces aligned as in use, one row a picture."""

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
from x2dfd.errors import X2DFDError
from x2dfd.experts import aliased
from x2dfd.files import write_text
from x2dfd.manifest import Sample, write_manifest

SCORED = re.compile(r"\bthe [\w -]+ score is\b", re.IGNORECASE)
"""A question that gives an expert's score."""


def adopt(path: Path, out: Path, *, pictures: Path | None = None, experts: str = "") -> Path:
    """Write the conversations of `path` (a format of `exchange`) as `data_gen build` writes its own; returns the JSONL.

    `out` gets `instructions.jsonl`, a record an answer, `card.json` and `manifest.jsonl`, all of split `train`. A
    picture's label is the verdict that an answer about it begins with, or its records' `label`. `pictures`: as in
    `exchange.read`. `experts`: whose scores the questions give, as in `x2dfd.experts.aliased`. Pictures without a
    usable face are left out, and the card counts them. Raises X2DFDError for a conversation that this project's prompts
    have no place for.
    """
    records = read(path, pictures)
    names, aliases = aliased(experts)
    said: dict[str, list[list[dict[str, str]]]] = {}  # by picture: one conversation an answer, which is its last turn
    given: dict[str, set[str]] = {}
    for record in records:
        if reason := _unfit(record, bool(names)):
            raise X2DFDError(f"{path}, record {record['id']}: {reason}", code="conversation_unfit")
        turns = [dict(turn) for turn in record["conversations"]]
        turns[0]["value"] = f"{MARK}\n{turns[0]['value'].replace(MARK, '').strip()}"
        image = os.path.realpath(record["images"][0])
        said.setdefault(image, []).extend(turns[:end] for end in range(2, len(turns) + 1, 2))
        given.setdefault(image, set()).update({record["label"]} - {""})
    samples = [
        Sample(f"{k:06d}", Path(image), _label(path, image, given[image], about), source=path.stem, split="train")
        for k, (image, about) in enumerate(said.items())
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_manifest(out / "manifest.jsonl", samples)
    data = load_crops(out / "manifest.jsonl")
    made: list[Record] = []
    for row, sample in enumerate(data.samples):
        told = {"row": row, "label": sample.label, "split": sample.split, "dataset": path.stem, "licence": "not stated"}
        for k, turns in enumerate(said[str(sample.path)]):
            named = {"id": f"{sample.id}/{k}", "task": task_of(turns[-1]["value"]), "image": sample.id}
            made.append(named | told | {"df_class": "", "method": "", "cues": [], "conversations": turns})
    write_text(out / "instructions.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made))
    card = data_card(made, BuildConfig(data=str(out / "manifest.jsonl"), experts=names), out)
    card |= {"from": path.name, "aliases": aliases, "without_a_face": len(data.unusable)}
    write_text(out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return out / "instructions.jsonl"


def _unfit(record: Record, experts: bool) -> str:
    """Why a conversation cannot be trained on here; "" where it can."""
    questions = [turn["value"] for turn in record["conversations"][::2]]
    if len(record["images"]) != 1:
        return f"it is about {len(record['images'])} pictures, and training here takes one a conversation"
    if MARK not in questions[0]:
        return "its picture stands in a later question, and the prompts here begin with it"
    if record["system"]:
        return "it has a system prompt, and the prompts here have none"
    if not experts and any(SCORED.search(question) for question in questions):
        return "it gives experts' scores: name them: python -m data_gen adopt --experts ALIAS=NAME"
    return ""


def _label(path: Path, image: str, given: set[str], about: list[list[dict[str, str]]]) -> Literal["real", "fake"]:
    """The label of a picture that is given and that its answers agree on. Raises X2DFDError."""
    for answer in (turns[-1]["value"] for turns in about):
        given = given | {word.strip() for word in prompts.LABEL_WORDS if answer.startswith(prompts.STEM + word)}
    if given == {"real"}:
        return "real"
    if given == {"fake"}:
        return "fake"
    found = ", ".join(sorted(given)) or "no verdict, and no `label`"
    raise X2DFDError(
        f"{path}: {image} is to be called real or fake by what is said of it; it has {found}", code="label_unclear"
    )

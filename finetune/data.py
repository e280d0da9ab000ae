"""Instruction records to training packs: one picture, its prefix once, and every conversation about it behind it.

A pack is what inference does too (x2dfd.mllm): each conversation sees the prefix and itself, positions start anew after
the prefix, so a pack gives the same loss as its conversations one by one at a fraction of the cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from x2dfd import prompts
from x2dfd.crops import CropSet
from x2dfd.errors import X2DFDError
from x2dfd.tower import TowerFeatures, training_view

IGNORE = -100


@dataclass(frozen=True)
class Conversation:
    """One conversation as tokens."""

    tokens: list[int]  # what follows the picture: the question, earlier turns, then the last answer and its end
    answer: int  # how many of the last tokens are the answer
    heavy: int | None  # position in `tokens` of the label or yes/no token, which weighs more


def answer_tokens(
    processor: Any, question: str, answer: str, turns: Sequence[tuple[str, str]] = ()
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt after the picture, and of the last answer with its end.

    Both are the very strings that inference renders. `turns` as in `prompts.conversation`. Raises X2DFDError when the
    answer is empty.
    """
    if not answer.strip():
        raise X2DFDError(f"an empty answer has nothing to learn from: {question!r}")
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole: str = processor.apply_chat_template([*prompts.conversation(question, turns), said], tokenize=False)
    if not whole.startswith(prompts.render(processor, question, answer, turns)):
        raise X2DFDError("this chat template does not continue its own prompt; answers cannot be masked")
    _, before = prompts.prompt_tokens(processor, prompts.render(processor, question, turns=turns))
    _, ids = prompts.prompt_tokens(processor, whole.rstrip())
    if ids[: len(before)] != before:
        raise X2DFDError("this tokenizer joins prompt and answer in one token; answers cannot be masked")
    tokenizer = processor.tokenizer
    if ids[-1] not in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
        ids = [*ids, tokenizer.eos_token_id]
    return before, ids[len(before) :]


def conversation(processor: Any, record: dict[str, Any], label_ids: Sequence[int]) -> Conversation:
    """One record of the instruction set as tokens."""
    first, *between, gpt = (turn["value"] for turn in record["conversations"])
    question = first.removeprefix("<image>").removeprefix("\n")
    turns = list(zip(between[::2], between[1::2], strict=True))
    before, answer = answer_tokens(processor, question, gpt, turns)
    heavy = None
    if record["task"].startswith("detect"):
        heavy = next((len(before) + k for k, t in enumerate(answer[:8]) if t in label_ids), None)
        if heavy is None or not gpt.startswith(tuple(prompts.STEM + word for word in prompts.LABEL_WORDS)):
            raise X2DFDError(f"{record['id']}: the answer does not begin with the verdict: {gpt[:40]!r}")
    elif record["task"].startswith("cue"):
        heavy = len(before)
    return Conversation(before + answer, len(answer), heavy)


class Packs(Dataset[dict[str, Any]]):
    """One item a picture, with all its conversations."""

    def __init__(
        self,
        instructions: Path,
        split: str,
        processor: Any,
        label_ids: Sequence[int],
        data: CropSet,
        features: TowerFeatures | None,
        view_seed: int,
    ) -> None:
        by_row: dict[int, list[dict[str, Any]]] = {}
        with instructions.open(encoding="utf-8") as stream:
            for line in stream:
                record = json.loads(line)
                if record["split"] == split:
                    by_row.setdefault(record["row"], []).append(record)
        where = {int(r): k for k, r in enumerate(features.rows)} if features is not None else {}
        self.rows = sorted(by_row)
        if not self.rows:
            raise X2DFDError(f"{instructions}: no picture of split {split!r} to train on")
        absent = [r for r in self.rows if r not in where] if features is not None else []
        if absent:
            raise X2DFDError(f"{len(absent)} of {len(self.rows)} pictures have no cached features; give a larger limit")
        self.conversations = [[conversation(processor, r, label_ids) for r in by_row[row]] for row in self.rows]
        self._data, self._features, self._where, self._seed = data, features, where, view_seed
        self._image_processor = processor.image_processor
        self._before, _ = prompts.prompt_tokens(processor, prompts.render(processor, prompts.QUESTION))
        self._image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._image_tokens = _image_tokens(processor)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, Any]:
        row = self.rows[k]
        if self._features is not None:
            pixels = torch.from_numpy(np.asarray(self._features.patches[self._where[row]], np.float32))
        else:
            from PIL import Image

            view, _ = training_view(self._data.crops[row], self._seed, row)
            pixels = self._image_processor(Image.fromarray(view), return_tensors="pt")["pixel_values"][0]
        prefix = [*self._before, *[self._image_id] * self._image_tokens]
        return {"pixel_values": pixels, "prefix": prefix, "conversations": self.conversations[k]}


def _image_tokens(processor: Any) -> int:
    side = processor.image_processor.crop_size or processor.image_processor.size
    patches = (side["height"] // processor.patch_size) * (side["width"] // processor.patch_size)
    extra = processor.num_additional_image_tokens
    return int(patches + extra - (1 if processor.vision_feature_select_strategy == "default" else 0))


@dataclass(frozen=True)
class Collate:
    """Packs to one batch: tokens, positions restarting after the prefix, a block-diagonal mask, labels and weights."""

    pad: int
    verdict_weight: float

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(i["prefix"]) + sum(len(c.tokens) for c in i["conversations"]) for i in items]
        n, total = len(items), max(lengths)
        ids = torch.full((n, total), self.pad)
        positions = torch.zeros(n, total, dtype=torch.long)
        labels = torch.full((n, total), IGNORE)
        weights = torch.zeros(n, total)
        mask = torch.eye(total, dtype=torch.bool).repeat(n, 1, 1)[:, None]  # padding sees itself, or softmax is 0/0
        for b, item in enumerate(items):
            p = len(item["prefix"])
            ids[b, :p] = torch.tensor(item["prefix"])
            positions[b, :p] = torch.arange(p)
            mask[b, 0, :p, :p] = torch.ones(p, p, dtype=torch.bool).tril()
            at = p
            for c in item["conversations"]:
                end = at + len(c.tokens)
                ids[b, at:end] = torch.tensor(c.tokens)
                positions[b, at:end] = p + torch.arange(end - at)
                mask[b, 0, at:end, :p] = True
                mask[b, 0, at:end, at:end] = torch.ones(end - at, end - at, dtype=torch.bool).tril()
                labels[b, end - c.answer : end] = ids[b, end - c.answer : end]
                weights[b, end - c.answer : end] = 1.0
                if c.heavy is not None:
                    weights[b, at + c.heavy] = self.verdict_weight
                at = end
        if not (labels != IGNORE).any():
            raise X2DFDError("an empty label mask: this batch has nothing to learn from")
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": mask,
            "labels": labels,
            "weights": weights,
            "pixel_values": torch.stack([i["pixel_values"] for i in items]),
        }

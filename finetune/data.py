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
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from x2dfd import prompts
from x2dfd.crops import CropSet
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.explain import named_spans
from x2dfd.files import Json
from x2dfd.progress import progress
from x2dfd.prompts import Processor
from x2dfd.tower import VIEWS, CachedArray, TowerFeatures, seen_view

IGNORE = -100


@dataclass(frozen=True)
class Conversation:
    """One conversation as tokens."""

    tokens: list[int]  # what follows the picture: the question, earlier turns, then the last answer and its end
    answer: int  # how many of the last tokens are the answer
    heavy: int | None  # position in `tokens` of the label or yes/no token, which weighs more
    named: tuple[int, ...] = ()  # positions of words that name an area, an artifact or a class


def answer_tokens(
    processor: Processor, question: str, answer: str, turns: Sequence[tuple[str, str]] = ()
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt after the picture, and of the last answer with its end.

    Both are the very strings that inference renders. `turns` as in `prompts.conversation`. Raises X2DFDError when the
    answer is empty.
    """
    if not answer.strip():
        raise X2DFDError(f"an empty answer has nothing to learn from: {question!r}", code="answer_empty")
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole: str = processor.apply_chat_template([*prompts.conversation(question, turns), said], tokenize=False)
    if not whole.startswith(prompts.render(processor, question, answer, turns)):
        raise X2DFDError(
            "this chat template does not continue its own prompt; answers cannot be masked", code="template_unmaskable"
        )
    _, before = prompts.prompt_tokens(processor, prompts.render(processor, question, turns=turns))
    _, ids = prompts.prompt_tokens(processor, whole.rstrip())
    if ids[: len(before)] != before:
        raise X2DFDError(
            "this tokenizer joins prompt and answer in one token; answers cannot be masked",
            code="tokenizer_joins_answer",
        )
    tokenizer = processor.tokenizer
    if ids[-1] not in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
        ids = [*ids, tokenizer.eos_token_id]
    return before, ids[len(before) :]


def _turns(record: Json) -> tuple[str, list[tuple[str, str]], str]:
    """First question, the (answer, next question) turns after it, and the last answer."""
    first, *between, answer = (turn["value"] for turn in record["conversations"])
    question = first.removeprefix("<image>").removeprefix("\n")
    return question, list(zip(between[::2], between[1::2], strict=True)), answer


def conversation(processor: Processor, record: Json, label_ids: Sequence[int]) -> Conversation:
    """One record of the instruction set as tokens."""
    question, turns, gpt = _turns(record)
    before, answer = answer_tokens(processor, question, gpt, turns)
    named = tuple(len(before) + k for k in _named_tokens(processor, question, gpt, turns, len(answer)))
    heavy = None
    if record["task"].startswith("detect"):
        heavy = next((len(before) + k for k, t in enumerate(answer[:8]) if t in label_ids), None)
        if heavy is None or not gpt.startswith(tuple(prompts.STEM + word for word in prompts.LABEL_WORDS)):
            raise X2DFDError(
                f"{record['id']}: the answer does not begin with the verdict: {gpt[:40]!r}", code="verdict_not_first"
            )
    elif record["task"].startswith(("cue", "kind")):
        heavy = len(before)
    # "This image is fake": the verdict has its own weight, and the image is no area there.
    return Conversation(before + answer, len(answer), heavy, tuple(k for k in named if k > (heavy or 0)))


def _named_tokens(
    processor: Processor, question: str, answer: str, turns: Sequence[tuple[str, str]], count: int
) -> list[int]:
    """Which of an answer's `count` tokens name an area, an artifact or a class; none where offsets are not known."""
    if not processor.tokenizer.is_fast:
        return []
    text = prompts.render(processor, question, answer, turns)
    offsets = processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    first = len(text) - len(answer)
    places = [(a - first, b - first) for a, b in offsets if b > first][:count]
    spans = named_spans(answer)
    return [k for k, (a, b) in enumerate(places) if any(a < end and b > start for start, end in spans)]


Records = dict[int, list[Json]]
"""The conversations about each picture, by its row in the manifest's CropSet."""


def read_records(instructions: Path, split: str, data: CropSet, left_out: Sequence[str] = ()) -> Records:
    """The instruction records of a split by their picture's row, without the sources and generators `left_out`.

    A picture whose face comes from a donor of such a source goes too. Raises X2DFDError when there are none,
    UnknownName for an origin that the data does not hold.
    """
    origins = {s.origin for s in data.samples}
    of_group = {s.group: s.source for s in data.samples if not s.synthetic}
    for origin in left_out:
        if origin not in origins:
            raise UnknownName("source or generator", origin, origins)
    by_row: Records = {}
    with instructions.open(encoding="utf-8") as stream:
        for line in stream:
            record = json.loads(line)
            sample = data.samples[record["row"]]
            seen = {sample.origin, of_group.get(str(sample.extra.get("donor")))}
            if record["split"] == split and not seen & set(left_out):
                by_row.setdefault(record["row"], []).append(record)
    if not by_row:
        raise X2DFDError(f"{instructions}: no picture of split {split!r} to train on", code="split_empty")
    return dict(sorted(by_row.items()))


def view_image(data: CropSet, row: int, seed: int) -> Image.Image:
    """A picture's training view, as a model in use would see it, as a PIL image."""
    return Image.fromarray(seen_view(data.crops[row], seed, row))


class Packs(Dataset[Json]):
    """One item a picture, with all its conversations."""

    def __init__(
        self,
        by_row: Records,
        processor: Processor,
        label_ids: Sequence[int],
        data: CropSet,
        features: TowerFeatures | None,
        view_seed: int,
        layers: Sequence[int] = (),
    ) -> None:
        where = {int(r): k for k, r in enumerate(features.rows)} if features is not None else {}
        self.rows = list(by_row)
        absent = [r for r in self.rows if r not in where] if features is not None else []
        if absent:
            raise X2DFDError(
                f"{len(absent)} of {len(self.rows)} pictures have no cached features; give a larger limit",
                code="features_missing",
            )
        self.conversations = [[conversation(processor, r, label_ids) for r in records] for records in by_row.values()]
        self.lengths = [sum(len(c.tokens) for c in pack) for pack in self.conversations]
        self._data, self._features, self._where, self._seed = data, features, where, view_seed
        self._layers = tuple(layers) or (features.keep if features is not None else ())
        self._image_processor = processor.image_processor
        self._before, _ = prompts.prompt_tokens(processor, prompts.render(processor, prompts.QUESTION))
        self._image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._image_tokens = _image_tokens(processor)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Json:
        row = self.rows[k]
        if self._features is not None:
            pixels = torch.from_numpy(self._features.patches(self._where[row], self._layers))
        else:
            image = view_image(self._data, row, self._seed)
            pixels = self._image_processor(image, return_tensors="pt")["pixel_values"][0]
        prefix = [*self._before, *[self._image_id] * self._image_tokens]
        return {"pixel_values": pixels, "prefix": prefix, "conversations": self.conversations[k]}


@torch.inference_mode()
def cache_tower(
    model: Any, processor: Processor, data: CropSet, rows: NDArray[np.intp], folder: Path, key: Json, seed: int
) -> TowerFeatures:
    """What a LLaVA's own frozen tower gives for the training views, computed once and kept in 16 bits.

    Another `key` (base, layers, manifest) begins anew; a cut-off run goes on where it stopped.
    """
    layers = feature_layers(model)
    made_by = {"seed": seed, **VIEWS}
    key = {**key, "rows": [int(r) for r in rows], "layers": layers, **made_by}
    cache, patches = CachedArray(folder, "patches.npy", key), None
    tower, class_token = model.model.vision_tower, model.config.vision_feature_select_strategy == "default"
    here = next(tower.parameters())
    for at in progress(range(cache.done, len(rows)), "tower features"):
        if here.numel() == 0:
            raise X2DFDError(
                "under ZeRO-3 the tower is in pieces: fill cached_features in a run without it first",
                code="zero3_unsupported",
            )
        image = view_image(data, int(rows[at]), seed)
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"].to(here)
        states = tower(pixels, output_hidden_states=True).hidden_states
        found = torch.cat([states[k][:, int(class_token) :] for k in layers])  # [layers, patches, hidden]
        if patches is None:
            patches = cache.open((len(rows), *found.shape))
        patches[at] = found.half().cpu().numpy()
        if at % 64 == 63 or at + 1 == len(rows):
            cache.save(patches, at + 1)
    return TowerFeatures(rows, cache.open(()) if patches is None else patches, layers, class_token=False)


def feature_layers(model: Any) -> tuple[int, ...]:
    """The tower's layers that a LLaVA's projector reads."""
    layers = model.config.vision_feature_layer
    return (layers,) if isinstance(layers, int) else tuple(layers)


def _image_tokens(processor: Processor) -> int:
    side = processor.image_processor.crop_size or processor.image_processor.size
    patches = (side["height"] // processor.patch_size) * (side["width"] // processor.patch_size)
    extra = processor.num_additional_image_tokens
    return int(patches + extra - (1 if processor.vision_feature_select_strategy == "default" else 0))


@dataclass(frozen=True)
class Collate:
    """Packs to one batch: tokens, positions restarting after the prefix, a block-diagonal mask, labels and weights."""

    pad: int
    verdict_weight: float
    cue_weight: float = 1.0

    def __call__(self, items: Sequence[Json]) -> dict[str, Tensor]:
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
                weights[b, [at + k for k in c.named]] = self.cue_weight
                if c.heavy is not None:
                    weights[b, at + c.heavy] = self.verdict_weight
                at = end
        if not (labels != IGNORE).any():
            raise X2DFDError("an empty label mask: this batch has nothing to learn from", code="label_mask_empty")
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": mask,
            "labels": labels,
            "weights": weights,
            "pixel_values": torch.stack([i["pixel_values"] for i in items]),
        }

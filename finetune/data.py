"""Instruction records to training rows: one picture as the inputs of its family's processor, and conversations.

The picture and the text around it come from the functions that inference calls (x2dfd.mllm). If the family can keep
conversations apart, a row holds all those about its picture: each sees the picture and itself, and positions start anew
after the picture, so that the row gives the loss of its conversations one by one at a fraction of the cost. For other
families a row holds one conversation, and the stock model makes masks and positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_gen.adopt import adopt
from finetune.config import FinetuneConfig
from x2dfd import prompts
from x2dfd.checkpoints import family_of
from x2dfd.crops import CropSet
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.explain import named_spans
from x2dfd.files import Json, locked_folder, parse_json
from x2dfd.mllm import TEXT_INPUTS, after_image, prefix_inputs
from x2dfd.progress import progress
from x2dfd.prompts import Processor
from x2dfd.tower import VIEWS, CachedArray, TowerFeatures, augmented_view

IGNORE = -100
TALK = "talk"
"""Task of a conversation that is a row of its own (finetune.talks), and the key of its item."""
PARTS = "parts"
"""The key of a batch that consists of several, each with a forward pass of its own."""


@dataclass(frozen=True)
class Conversation:
    """One conversation as tokens."""

    tokens: list[int]  # after the picture: the question, earlier turns, then the last answer and its end
    answer: int  # how many of the last tokens are the answer
    heavy: int | None  # position in `tokens` of the label or yes/no token, which weighs more
    named: tuple[int, ...] = ()  # positions of words that name an area, an artifact or a class
    judges: bool = False  # whether the heavy token is the verdict that validation scores


def answer_tokens(
    processor: Processor, question: str, answer: str, turns: Sequence[tuple[str, str]] = ()
) -> tuple[list[int], list[int]]:
    """The tokens of the prompt after the picture, and of the last answer with its end, from the strings that inference
    renders. `turns` as in `prompts.conversation`. Raises X2DFDError when the answer is empty."""
    if not answer.strip():
        raise X2DFDError(f"an empty answer has nothing to learn from: {question!r}", code="answer_empty")
    prompt_ids = after_image(processor, question, turns=turns).tokens
    all_ids = after_image(processor, question, answer, turns).tokens
    if all_ids[: len(prompt_ids)] != prompt_ids:
        raise X2DFDError("this tokenizer joins prompt and answer in one token", code="tokenizer_joins_answer")
    return prompt_ids, [*all_ids[len(prompt_ids) :], prompts.answer_end(processor)]


def conversation(processor: Processor, record: Json, label_ids: Sequence[int]) -> Conversation:
    """One record of the instruction set as tokens."""
    first, *between, reply = (turn["value"] for turn in record["conversations"])
    question = first.removeprefix("<image>").removeprefix("\n")
    turns = list(zip(between[::2], between[1::2], strict=True))  # (answer, next question)
    prompt_ids, answer_ids = answer_tokens(processor, question, reply, turns)
    named = tuple(len(prompt_ids) + k for k in _named_tokens(processor, question, reply, turns, len(answer_ids)))
    heavy = None
    if record["task"].startswith("detect"):
        heavy = len(after_image(processor, question, prompts.STEM, turns).tokens)
        starts = tuple(prompts.STEM + word for word in prompts.LABEL_WORDS)
        if not reply.startswith(starts) or (prompt_ids + answer_ids)[heavy] not in label_ids:
            raise X2DFDError(
                f"{record['id']}: the verdict does not come first: {reply[:40]!r}", code="verdict_not_first"
            )
    elif record["task"].startswith(("cue", "kind")):
        heavy = len(prompt_ids)
    # Words up to the verdict do not count: in "This image is fake", `image` names no area.
    named = tuple(k for k in named if k > (heavy or 0))
    return Conversation(prompt_ids + answer_ids, len(answer_ids), heavy, named, judges=record["task"] == "detect")


def _named_tokens(
    processor: Processor, question: str, answer: str, turns: Sequence[tuple[str, str]], count: int
) -> list[int]:
    """Positions among an answer's `count` tokens that name an area, an artifact or a class; none without offsets."""
    if not processor.tokenizer.is_fast:
        return []
    text = prompts.render(processor, question, answer, turns)
    add = not prompts.begins(processor, text)
    offsets = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=add)["offset_mapping"]
    first = len(text) - len(answer)
    character_spans = [(a - first, b - first) for a, b in offsets if b > first][:count]
    spans = named_spans(answer)
    return [k for k, (a, b) in enumerate(character_spans) if any(a < end and b > start for start, end in spans)]


def adopted(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with every set of another stack, which lacks a card of ours, converted to `out/sets`. For such
    a set, `manifest` names the folder of its pictures. Raises X2DFDError as `adopt` does."""
    paths = [[v] if isinstance(v, str) else list(v) for v in (config.instructions, config.manifest)]
    for k, (instructions, manifest) in enumerate(zip(*paths, strict=True)):
        if not (Path(instructions).parent / "card.json").is_file():
            converted = adopt(Path(instructions), Path(config.out) / "sets" / str(k), pictures=Path(manifest))
            paths[0][k], paths[1][k] = str(converted), str(converted.parent / "manifest.jsonl")
    ours = [p[0] if isinstance(config.instructions, str) else tuple(p) for p in paths]
    return replace(config, instructions=ours[0], manifest=ours[1])


Records = dict[int, list[Json]]
"""The conversations about each picture, by its row in the manifest's CropSet."""


def read_records(
    instructions: Path, split: str, data: CropSet, left_out: Sequence[str] = (), limit: int | None = None
) -> Records:
    """The instruction records of a split by their picture's row, without the sources and generators `left_out`; at most
    `limit` pictures, sampled by their ids. Raises X2DFDError when there are none, and as `learnable`."""
    rows = set(learnable(data, split, left_out))
    by_row: Records = {}
    for record in records(instructions):
        if record["split"] == split and record.get("row") in rows:
            by_row.setdefault(record["row"], []).append(record)
    if not by_row:
        raise X2DFDError(f"{instructions} has no picture of the manifest's split {split!r}", code="split_empty")
    selected = sorted(by_row, key=lambda row: hashlib.sha256(data.samples[row].id.encode()).digest())[:limit]
    return {row: by_row[row] for row in sorted(selected)}


def records(instructions: Path) -> Iterator[Json]:
    """The records of a file as `data_gen build` writes it. Raises X2DFDError with the number of a malformed record."""
    number = 0
    try:
        with instructions.open("rb") as stream:
            for line in stream:
                number += 1
                yield _checked(parse_json(line))
    except (OSError, ValueError) as error:
        raise X2DFDError(f"{instructions}, record {number}: {error}", code="instructions_unreadable") from error


def _checked(record: object) -> Json:
    """The record itself. Raises ValueError unless it has every field that is read here."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    subject: dict[str, type] = {"images": list} if record.get("task") == TALK else {"row": int}
    for key, kind in {"id": str, "task": str, "split": str, "conversations": list, **subject}.items():
        if type(record.get(key)) is not kind:
            raise ValueError(f"{key!r} is not of type {kind.__name__}")
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in record["conversations"]]
    if not texts or len(texts) % 2 or not all(isinstance(value, str) for value in texts):
        raise ValueError("'conversations' are not question and answer in turn")
    return record


def learnable(data: CropSet, split: str, left_out: Sequence[str] = ()) -> list[int]:
    """The rows of a split, without the origins `left_out` and without faces of donors from there. Raises UnknownName
    for an origin that the data does not hold."""
    origins = {s.origin for s in data.samples}
    donor_sources = {s.group: s.source for s in data.samples if not s.synthetic}
    for origin in left_out:
        if origin not in origins:
            raise UnknownName("source or generator", origin, origins)
    excluded = set(left_out)
    return [
        i
        for i, s in enumerate(data.samples)
        if s.split == split and not {s.origin, donor_sources.get(str(s.extra.get("donor")))} & excluded
    ]


class Rows(Dataset[Json]):
    """One item per row: the inputs up to the end of a picture, and the conversations after it.

    `positions` is None if a row holds one conversation. If it holds all about its picture, these are the positions of
    the tokens before them: [1, tokens], or [3, tokens] in a family that counts time, height and width. `marks_answers`:
    picture and question have full attention, and `token_type_ids` mark the answer (PaliGemma).
    """

    def __init__(
        self,
        by_row: Records,
        model: Any,
        processor: Processor,
        data: CropSet,
        view_seed: int,
        features: TowerFeatures | None = None,
    ) -> None:
        self._data, self._features, self._seed, self._processor = data, features, view_seed, processor
        self._cache_index = {int(r): k for k, r in enumerate(features.rows)} if features is not None else {}
        missing = [r for r in by_row if r not in self._cache_index] if features is not None else []
        if missing:
            raise X2DFDError(
                f"no cached features of {len(missing)} pictures; give a larger limit", code="features_missing"
            )
        self._after = after_image(processor, prompts.QUESTION).tokens
        # All pictures have one size, so their prefixes differ in the pixels alone.
        self._first = self._prefix(next(iter(by_row)))
        self.positions = _positions(model, self._first) if can_pack(model, self._first) else None
        self.marks_answers = not family_of(model.config).shares
        self._layers = feature_layers(model) if features is not None else ()
        label_ids = prompts.first_tokens(processor, prompts.STEM, prompts.LABEL_WORDS)
        parsed = {row: [conversation(processor, r, label_ids) for r in records] for row, records in by_row.items()}
        packed = self.positions is not None
        self._rows = [(row, some) for row, c in parsed.items() for some in ([c] if packed else [[one] for one in c])]
        self.pictures = len(by_row)
        self.lengths = [sum(len(c.tokens) for c in some) for _, some in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, k: int) -> Json:
        row, conversations = self._rows[k]
        if self._features is not None:
            patches = torch.from_numpy(self._features.patches(self._cache_index[row], self._layers))
            prefix = self._first | {"pixel_values": patches[None]}
        else:
            prefix = self._prefix(row)
        return {"prefix": prefix, "conversations": conversations}

    def _prefix(self, row: int) -> dict[str, Tensor]:
        return prefix_inputs(self._processor, augmented_view(self._data.views[row], self._seed, row)[None], self._after)


def can_pack(model: Any, prefix: dict[str, Tensor]) -> bool:
    """Whether one row can hold several conversations: not if a layer has a sliding window, which counts positions in
    the row, nor if the model makes its masks from `token_type_ids`."""
    return "token_type_ids" not in prefix and not getattr(model.get_decoder().config, "sliding_window", None)


def _positions(model: Any, prefix: dict[str, Tensor]) -> Tensor:
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(prefix["input_ids"].shape[1])[None]
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    positions: Tensor = model.model.get_rope_index(**{k: prefix[k] for k in keys})[0]
    return positions[:, 0]


@torch.inference_mode()
def cache_tower(
    model: Any, processor: Processor, data: CropSet, rows: NDArray[np.intp], folder: Path, key: Json, seed: int
) -> TowerFeatures:
    """The outputs of a LLaVA's own frozen tower for the augmented views, computed once and stored in 16 bits. Another
    `key` (base, layers, manifest) starts over; an interrupted run resumes."""
    layers = feature_layers(model)
    key = {**key, "rows": rows.tolist(), "layers": layers, "seed": seed, **VIEWS}
    tower, class_token = model.model.vision_tower, model.config.vision_feature_select_strategy == "default"
    parameter = next(tower.parameters())
    with locked_folder(folder, wait=True):
        cache, patches = CachedArray(folder, "patches.npy", key, (len(rows), len(layers))), None
        for index in progress(range(cache.done, len(rows)), "tower features"):
            if parameter.numel() == 0:
                raise X2DFDError(
                    "under ZeRO-3 the tower is in pieces: fill cached_features in a run without it first",
                    code="zero3_unsupported",
                )
            view = Image.fromarray(augmented_view(data.views[int(rows[index])], seed, int(rows[index])))
            pixels = processor.image_processor(view, return_tensors="pt")["pixel_values"].to(parameter)
            states = tower(pixels, output_hidden_states=True).hidden_states
            features = torch.cat([states[k][:, int(class_token) :] for k in layers])  # [layers, patches, hidden]
            if patches is None:
                patches = cache.open(*features.shape[1:])
            patches[index] = features.half().cpu().numpy()
            if index % 64 == 63 or index + 1 == len(rows):
                cache.save(patches, index + 1)
        return TowerFeatures(rows, cache.open() if patches is None else patches, layers, class_token=False)


def feature_layers(model: Any) -> tuple[int, ...]:
    """The tower's layers that a LLaVA's projector reads."""
    layers = model.config.vision_feature_layer
    return (layers,) if isinstance(layers, int) else tuple(layers)


@dataclass(frozen=True)
class Collate:
    """Rows to one batch: the model's inputs, `labels`, `weights`, and `verdicts` [n].

    `verdicts` holds the position of each row's verdict among its tokens, or -1. `positions` and `marks_answers` are
    those of `Rows`.
    """

    pad: int
    verdict_weight: float
    cue_weight: float = 1.0
    positions: Tensor | None = None
    marks_answers: bool = False

    def __call__(self, items: Sequence[Json]) -> Json:
        """The batch of some items. Talks become a batch of PARTS, as they differ in pictures and cannot be padded."""
        if talks := [i[TALK] for i in items if TALK in i]:
            rows = [i for i in items if TALK not in i]
            return {PARTS: [*talks, *([self(rows)] if rows else [])]}
        prefix = {k: torch.cat([i["prefix"][k] for i in items]) for k in items[0]["prefix"]}
        n, p = prefix["input_ids"].shape
        tokens = [[t for c in i["conversations"] for t in c.tokens] for i in items]
        longest = max(map(len, tokens))
        ids = torch.full((n, longest), self.pad)
        labels, weights = torch.full((n, p + longest), IGNORE), torch.zeros(n, p + longest)
        verdicts = torch.full((n,), -1)
        for b, item in enumerate(items):
            ids[b, : len(tokens[b])] = torch.tensor(tokens[b])
            start = p
            for c in item["conversations"]:
                end = start + len(c.tokens)
                labels[b, end - c.answer : end] = ids[b, end - c.answer - p : end - p]
                weights[b, end - c.answer : end] = 1.0
                weights[b, [start + k for k in c.named]] = self.cue_weight
                if c.heavy is not None:
                    weights[b, start + c.heavy] = self.verdict_weight
                    verdicts[b] = start + c.heavy if c.judges else verdicts[b]
                start = end
        if not (labels != IGNORE).any():
            raise X2DFDError("an empty label mask: this batch has nothing to learn from", code="label_mask_empty")
        lengths = torch.tensor([len(s) for s in tokens])[:, None]
        text_inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(longest) < lengths).long(),
            "token_type_ids": ((labels[:, p:] != IGNORE) & self.marks_answers).long(),
            "mm_token_type_ids": ids * 0,
        }
        text = {k: torch.cat([prefix[k], text_inputs[k]], 1) for k in TEXT_INPUTS if k in prefix}
        if self.positions is not None:
            text |= self._pack(items, self.positions, longest)
        pictures = {k: v for k, v in prefix.items() if k not in text}
        # Token ids come first: Trainer takes the batch size from the first entry, but Qwen's pixels are patches.
        return {**text, **pictures, "labels": labels, "weights": weights, "verdicts": verdicts}

    def _pack(self, items: Sequence[Json], prefix_positions: Tensor, longest: int) -> dict[str, Tensor]:
        """Positions that start anew after the picture, and a mask under which no conversation sees another."""
        n, p = len(items), prefix_positions.shape[1]
        total, first = p + longest, int(prefix_positions.max()) + 1
        positions = torch.zeros(len(prefix_positions), n, total, dtype=torch.long)
        positions[..., :p] = prefix_positions[:, None]
        mask = torch.eye(total, dtype=torch.bool).repeat(n, 1, 1)[:, None]  # padding sees itself, or softmax is 0/0
        mask[:, 0, :p, :p] = torch.ones(p, p, dtype=torch.bool).tril()
        for b, item in enumerate(items):
            start = p
            for c in item["conversations"]:
                size = len(c.tokens)
                positions[:, b, start : start + size] = first + torch.arange(size)
                mask[b, 0, start : start + size, :p] = True
                mask[b, 0, start : start + size, start : start + size] = torch.ones(size, size, dtype=torch.bool).tril()
                start += size
        return {"position_ids": positions if len(prefix_positions) > 1 else positions[0], "attention_mask": mask}

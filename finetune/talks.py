"""Conversations about several pictures, or about none: each is a row of its own for the unchanged stock model.

Face, crop and augmented view of each picture are made as everywhere else, and the stock processor renders the messages.
Validation does not score such conversations: they keep a model's other skills alive, or teach it to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_gen.exchange import MARK
from finetune.data import IGNORE, TALK, records
from x2dfd import prompts
from x2dfd.errors import X2DFDError
from x2dfd.faces import find_faces
from x2dfd.files import Json
from x2dfd.media import load_picture
from x2dfd.mllm import TEXT_INPUTS
from x2dfd.prompts import Processor
from x2dfd.tower import augmented_view


def read_talks(instructions: Path) -> list[Json]:
    """The records of an instruction set that have `images` in place of a `row`."""
    return [record for record in records(instructions) if record["task"] == TALK]


class Talks(Dataset[Json]):
    """One item per conversation: under `talk`, the model's inputs with `labels` and `weights`. `side`: of the face
    crops. Raises X2DFDError for a family without a chat template, which takes one picture."""

    def __init__(self, records: Sequence[Json], processor: Processor, side: int, view_seed: int) -> None:
        if not processor.chat_template:
            raise X2DFDError(
                "without a chat template (PaliGemma), every conversation must be about one picture: remove the others",
                code="conversation_unfit",
            )
        self._records, self._processor, self._side, self._seed = records, processor, side, view_seed
        texts = (" ".join(turn["value"] for turn in record["conversations"]) for record in records)
        self.lengths = [len(processor.tokenizer(text)["input_ids"]) for text in texts]
        self.pictures = sum(len(record["images"]) for record in records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, k: int) -> Json:
        record = self._records[k]
        views = [augmented_view(_face(path, self._side), self._seed, k) for path in record["images"]]
        inputs, answer = talk_inputs(self._processor, record["conversations"], views)
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        labels[:, -answer:] = inputs["input_ids"][:, -answer:]
        return {TALK: {**inputs, "labels": labels, "weights": (labels != IGNORE).float()}}


def _face(path: str, side: int) -> NDArray[np.uint8]:
    faces = find_faces(load_picture(path).pixels, side)
    if not faces:
        raise X2DFDError(f"{path} has no usable face any more: adopt the conversations again", code="no_usable_face")
    return faces[0].view


def messages_of(turns: Sequence[dict[str, str]]) -> list[Json]:
    """Turns of an instruction set as chat messages, with a picture in place of each mark."""
    messages: list[Json] = []
    for turn in turns:
        content: list[Json] = []
        for number, text in enumerate(turn["value"].split(MARK)):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": stripped}] if (stripped := text.strip("\n")) else []
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
    return messages


def talk_inputs(
    processor: Processor, turns: Sequence[dict[str, str]], pictures: Sequence[NDArray[np.uint8]]
) -> tuple[dict[str, Tensor], int]:
    """The stock processor's inputs for a whole conversation with its end token, and the number of the answer's tokens.
    Raises X2DFDError when the answer cannot be separated from the prompt."""
    messages, answer = messages_of(turns[:-1]), turns[-1]["value"]
    texts = [prompts.begun(processor, messages, start) for start in ("", answer)]
    add = not prompts.begins(processor, texts[1])
    prompt_ids, all_ids = (processor.tokenizer(text, add_special_tokens=add)["input_ids"] for text in texts)
    if all_ids[: len(prompt_ids)] != prompt_ids or len(all_ids) == len(prompt_ids):
        raise X2DFDError(
            "this tokenizer joins prompt and answer in one token, or the answer is empty; it cannot be masked",
            code="tokenizer_joins_answer",
        )
    images = [[Image.fromarray(picture) for picture in pictures]] if pictures else None
    inputs: dict[str, Tensor] = dict(
        processor(text=[texts[1]], images=images, return_tensors="pt", add_special_tokens=add)
    )
    last = {"input_ids": prompts.answer_end(processor), "attention_mask": 1}
    for key in TEXT_INPUTS:
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.tensor([[last.get(key, 0)]])], 1)
    # Token ids come first: Trainer takes the batch size from the first entry.
    return {"input_ids": inputs.pop("input_ids"), **inputs}, len(all_ids) - len(prompt_ids) + 1

"""Conversations about several pictures or none are trained on in the stock processor's words, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data_gen.adopt import adopt
from finetune import train as training
from finetune.config import FinetuneConfig
from finetune.data import IGNORE, PARTS, TALK, Collate
from finetune.models import open_base, tune
from finetune.talks import Talks, messages_of, read_talks
from tests import families
from tests.raising import raises
from x2dfd import prompts
from x2dfd.checkpoints import FAMILIES, load_processor, processor_class
from x2dfd.errors import SetupError
from x2dfd.faces import find_faces
from x2dfd.tower import augmented_view

TOLD = [
    ("<image>\nIs this image real or fake?", "This image is real.", ("0.png",)),
    ("<image>\nIs this image real or fake?", "This image is fake. The jaw.", ("1.png",)),
    ("<image>\n<image>\nWhich of the two is forged?", "The second.", ("0.png", "1.png")),
    ("What is a seam?", "The edge of a swapped face.", ()),
]
"""Of one picture twice, of two, and of none."""


@pytest.fixture
def told(tmp_path: Path, astronaut: NDArray[np.uint8]) -> Path:
    """Conversations as LLaVA's code reads them, with their pictures, as a set of ours."""
    Image.fromarray(astronaut).save(tmp_path / "0.png")
    Image.fromarray(np.ascontiguousarray(astronaut[:, ::-1])).save(tmp_path / "1.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "none.png")
    records = [
        {"images": list(pictures), "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a, pictures in (*TOLD, ("<image><image>\nAlike?", "No.", ("0.png", "none.png")))
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    return adopt(tmp_path / "train.json", tmp_path / "set")


def checkpoint(name: str, folder: Path) -> Any:
    try:
        processor_class(FAMILIES[families.KINDS[name][0]])
    except SetupError as error:
        pytest.skip(str(error))
    return families.write_model(folder, name)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in families.KINDS if not n.startswith("PaliGemma")])
def test_talk_is_the_stock_processors(name: str, told: Path, tmp_path: Path) -> None:
    """Token by token and pixel by pixel, with one begin token; and the answer alone is learnt, with its end."""
    stock = checkpoint(name, tmp_path / "base")
    records = read_talks(told)
    assert [len(r["images"]) for r in records] == [2, 0]  # what needs a picture without a face is left out
    talks = Talks(records, load_processor(tmp_path / "base"), 224, 1)
    for k, record in enumerate(records):
        pictures = [Image.fromarray(augmented_view(find_faces(_pixels(p))[0].crop, 1, k)) for p in record["images"]]
        messages, left = messages_of(record["conversations"]), list(pictures)
        for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
            part["image"] = left.pop(0)
        if "strftime_now" in str(stock.chat_template):
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompts.SERVED_SYSTEM}]})
        options = {"continue_final_message": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        want = stock.apply_chat_template(messages, **options)
        got = talks[k][TALK]
        assert got["input_ids"][0, :-1].tolist() == want["input_ids"][0].tolist()
        for key in set(want) & set(got) - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
            assert torch.equal(got[key], want[key])
        learnt = got["labels"][0][got["labels"][0] != IGNORE].tolist()
        said = stock.tokenizer.decode(learnt[:-1])
        assert said.strip() == record["conversations"][-1]["value"] and len(learnt) > 1


def _pixels(path: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen3-VL", "Idefics3", "Gemma 3"])
def test_several_pictures_and_none(name: str, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch with conversations about one picture, on a loss that is the mean over all answers."""
    checkpoint(name, tmp_path / "base")
    plain, seen = Collate.__call__, list[int]()

    def noted(self: Collate, items: Any) -> Any:
        batch = plain(self, items)
        seen.append(len(batch.get(PARTS, ())))
        return batch

    monkeypatch.setattr(Collate, "__call__", noted)
    config = FinetuneConfig(
        str(told), str(told.with_name("manifest.jsonl")), str(tmp_path / "out"), base=str(tmp_path / "base"), lora_r=4,
        lora_alpha=8, lora_dropout=0.0, lr=1e-2, accumulate=1, batch=8, max_steps=3, save_steps=100, crop_size=224,
    )  # fmt: skip
    training.train(config)
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert log[-1]["train_loss"] < log[0]["loss"]
    assert 3 in seen  # two conversations of their own, and the rows of one picture together
    assert json.loads((tmp_path / "out" / "card.json").read_text())["figures"]["pictures"] == 4


@pytest.mark.slow
def test_every_process_has_every_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a picture nothing passes through the projector: the other processes would wait for it for ever."""
    checkpoint("LLaVA-1.5", tmp_path)
    config = FinetuneConfig("i", "m", "o", base=str(tmp_path), base_dtype="float32")
    model, processor = open_base(config)
    tuned, _ = tune(model, config)
    turns = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]
    talks = Talks([{"images": [], "conversations": turns}], processor, 224, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    training.RowTrainer.compute_loss(cast(Any, None), tuned, Collate(0, 1.0)([talks[0]])).backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_a_family_of_one_picture_says_so() -> None:
    """PaliGemma's plain prompt has one picture, in front: another place would be made up."""
    with raises("conversation_unfit", "chat template"):
        Talks([], cast(Any, type("Plain", (), {"chat_template": None})()), 224, 1)

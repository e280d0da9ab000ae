"""Instruction sets go to LLaVA, LLaMA-Factory and ms-swift and come from there: what is trained on must be the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from data_gen.adopt import adopt
from data_gen.build import BuildConfig, build
from data_gen.exchange import FORMATS, read, write
from finetune.config import FinetuneConfig
from finetune.data import read_records
from finetune.train import train
from tests import tiny
from tests.raising import raises
from x2dfd.adapter import read_adapter_card
from x2dfd.crops import load_crops
from x2dfd.experts import BUILTIN
from x2dfd.tower import augmented_view

Record = dict[str, Any]
Turns = list[tuple[str, str]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small manifest, and the folder with its instruction set in every format."""
    folder = tmp_path_factory.mktemp("exchange")
    manifest = tiny.write_small_manifest(folder / "small", np.asarray(skimage.data.astronaut()), 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
        build(BuildConfig(data=str(manifest), experts=(tiny.EXPERT,), format="llava"), folder / "set")
    for form in FORMATS[1:]:
        write(every(folder / "set"), load_crops(manifest), 1, folder / "set", form)
    return manifest, folder / "set"


def every(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "instructions.jsonl").read_text().splitlines()]


def ours(folder: Path) -> list[Record]:
    return [r for r in every(folder) if r["split"] == "train"]


# What each stack's documentation says that it reads; a record is its turns and the files of its pictures. ------------


def as_llava(folder: Path) -> list[tuple[Turns, list[Path]]]:
    """docs/Finetune_Custom_Data.md: `--data_path train.json --image_folder FOLDER`."""
    samples = json.loads((folder / "train.json").read_text())
    assert isinstance(samples, list) and len({s["id"] for s in samples}) == len(samples)
    for sample in samples:
        assert sample.keys() == {"id", "image", "conversations"}
        assert all(turn.keys() == {"from", "value"} for turn in sample["conversations"])
        assert [t["from"] for t in sample["conversations"]] == ["human", "gpt"] * (len(sample["conversations"]) // 2)
    return [([(t["from"], t["value"]) for t in s["conversations"]], [folder / s["image"]]) for s in samples]


def as_sharegpt(folder: Path) -> list[tuple[Turns, list[Path]]]:
    """data/README.md: the set is described in dataset_info.json, the tags are the default ones, paths are its own."""
    told = json.loads((folder / "dataset_info.json").read_text())["x2dfd_train"]
    assert told.keys() == {"file_name", "formatting", "columns"} and told["formatting"] == "sharegpt"
    samples = json.loads((folder / told["file_name"]).read_text())
    found = []
    for sample in samples:
        turns = [(t["from"], t["value"]) for t in sample[told["columns"]["messages"]]]
        assert [who for who, _ in turns] == ["human", "gpt"] * (len(turns) // 2)
        found.append((turns, [folder / image for image in sample[told["columns"]["images"]]]))
    return found


def as_messages(folder: Path) -> list[tuple[Turns, list[Path]]]:
    """docs/source_en/Customization/Custom-dataset.md: a line is a record, paths are whole, no other key is needed."""
    found = []
    for line in (folder / "train.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert sample.keys() == {"messages", "images"} and all(Path(p).is_absolute() for p in sample["images"])
        roles = [m["role"] for m in sample["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        speaker = {"user": "human", "assistant": "gpt"}
        turns = [(speaker[m["role"]], m["content"]) for m in sample["messages"]]
        found.append((turns, [Path(p) for p in sample["images"]]))
    return found


@pytest.mark.parametrize(("form", "read_as"), list(zip(FORMATS, (as_llava, as_sharegpt, as_messages), strict=True)))
def test_an_exported_set_is_read_as_its_stack_documents(
    built: tuple[Path, Path], form: str, read_as: Callable[[Path], list[tuple[Turns, list[Path]]]]
) -> None:
    """A missing mark, a swapped picture or a calibration picture among the training ones would go unnoticed there."""
    manifest, folder = built
    records, data = ours(folder), load_crops(manifest)
    found = read_as(folder / form)
    assert len(found) == len(records) > 0
    for (turns, pictures), record in zip(found, records, strict=True):
        assert turns == [(t["from"], t["value"]) for t in record["conversations"]]
        assert sum(text.count("<image>") for _, text in turns) == len(pictures) == 1
        assert turns[0][1].startswith("<image>\n")
        seen = augmented_view(data.crops[record["row"]], 1, record["row"])
        with Image.open(pictures[0]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), seen)
    # Trained there or here, question, answer and what counts as a verdict are the same.
    back = read(folder / form / ("train.jsonl" if form == "messages" else "train.json"))
    for record, before in zip(back, records, strict=True):
        assert record["conversations"] == before["conversations"] and record["system"] == ""
        assert record["task"] == ("detect" if before["task"].startswith("detect") else "chat")
        assert Path(record["images"][0]) == folder / form / "images" / f"{before['row']:06d}.png"


def written(folder: Path, *records: Record, lines: bool = False) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    path = folder / "set.json"
    said = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(said) if lines else f"[{','.join(said)}]", encoding="utf-8")
    return path


def talk(*said: str) -> list[Record]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_one_several_and_no_picture_are_read(tmp_path: Path, lines: bool) -> None:
    """Each stack puts pictures, system prompts and speakers elsewhere."""
    path = written(
        tmp_path,
        {"id": "one", "image": "a.png", "conversations": talk("<image>\nReal or fake?", "This image is fake. A seam.")},
        {"conversations": talk("Which is forged? <image><image>", "The first."), "images": ["a.png", "b.png"]},
        {"messages": [{"role": "system", "content": "Look well."}, {"role": "user", "content": "Hello?"},
                      {"role": "assistant", "content": "Hello."}]},
        {"conversations": talk("Unmarked?", "Yes", "Why?", "So.\u2028"), "images": ["b.png"], "system": "Be brief."},
        {"image": "a.png", "conversations": [*talk("Real?", "Real."), {"from": "real score", "value": "0.6"}]},
        lines=lines,
    )  # fmt: skip
    one, two, none, unmarked, scored = read(path)
    assert scored["conversations"] == talk("<image>\nReal?", "Real.")  # X2-DFD's results, with turns nobody answered
    assert (one["id"], one["task"], one["images"]) == ("one", "detect", [str(tmp_path / "a.png")])
    assert [Path(p).name for p in two["images"]] == ["a.png", "b.png"] and two["task"] == "chat"
    assert (none["images"], none["system"]) == ([], "Look well.") and none["conversations"] == talk("Hello?", "Hello.")
    assert unmarked["conversations"][0]["value"] == "<image>\nUnmarked?" and unmarked["system"] == "Be brief."


@pytest.mark.parametrize(
    ("record", "fact"),
    [
        ({"conversations": talk("Hm?")}, "alternate"),
        ({"conversations": talk("Hm?", "<image>"), "image": "a.png"}, "an answer"),
        ({"conversations": talk("<image>", "Yes")}, "0 pictures"),
        ({"conversations": talk("<image>", "Yes"), "images": ["a.png", "b.png"]}, "2 pictures"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "'tool'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "a text"),
        ({"conversations": talk("<image>", "Yes"), "image": "gone.png"}, "gone.png"),
        ({"Description": "", "images": ["a.png"]}, "conversations"),
        ("text", "record 0"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(tmp_path: Path, record: Any, fact: str) -> None:
    """Trained on all the same, it would teach something that nobody wrote."""
    with raises("pictures_missing" if fact == "gone.png" else "conversation_invalid", fact):
        read(written(tmp_path, record))
    for text in ("", "[]", "not JSON", '{"Description": "",\n "images": []}', "[" * 100_000):
        (tmp_path / "set.json").write_text(text)
        with raises("conversations_unreadable" if text.strip("[]") or len(text) > 2 else "no_conversation", "set.json"):
            read(tmp_path / "set.json")
    with raises("unknown_name", "did you mean 'llava'"):  # before any work
        build(BuildConfig(data="nowhere.csv", format="lava"), tmp_path)


def about(image: str, *said: str, **more: Any) -> Record:
    return {"image": image, "conversations": talk(*said), **more}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, built: tuple[Path, Path]) -> Path:
    """A folder with photos of a face and of none, and conversations about them as X2-DFD writes them."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes((built[0].parent / name).read_bytes())
    Image.new("RGB", (64, 64)).save(folder / "none.png")
    scored = "<image>\nIs this image real or fake? And the blending score is 0.812."
    records = [
        about("0.png", scored, "This image is real."),
        about("1.png", scored, "This image is fake. The jaw.", "Why?", "The edge of the jaw."),
        about("1.png", "Is the jaw blurred? <image>", "Yes"),
        about("none.png", "<image>\nIs this image real or fake?", "This image is real."),
    ]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def test_conversations_become_a_set_of_ours(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faces as in use, labels as said, and a picture in one row however many conversations are about it."""
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
    made = adopt(photos / "train.json", tmp_path / "set", experts=f"blending={tiny.EXPERT}")
    data = load_crops(tmp_path / "set" / "manifest.jsonl")
    assert [(s.path.name, s.label) for s in data.samples] == [("0.png", "real"), ("1.png", "fake")]
    rows = read_records(made, "train", data)
    assert [[r["task"] for r in records] for records in rows.values()] == [["detect"], ["detect", "chat", "chat"]]
    learnt = [r["conversations"][-1]["value"] for r in rows[1]]  # each answer, and what stood before it is read
    assert learnt == ["This image is fake. The jaw.", "The edge of the jaw.", "Yes"]
    assert rows[1][2]["conversations"][0]["value"] == "<image>\nIs the jaw blurred?"
    card = json.loads((tmp_path / "set" / "card.json").read_text())
    assert card["config"]["experts"] == [tiny.EXPERT] and card["aliases"] == {tiny.EXPERT: "blending"}
    assert (card["pictures"], card["without_a_face"]) == (2, 1)


@pytest.mark.parametrize(
    ("record", "code", "fact"),
    [
        (about("a.png", "Hm?", "Yes", images=[]), "label_unclear", "`label`"),
        (about("a.png", "Hm?", "This image is fake.", label="real"), "label_unclear", "fake, real"),
        (about("a.png", "And the seam score is 0.5.", "This image is fake."), "conversation_unfit", "--experts"),
        (about("a.png", "Hm?", "This image is fake.", system="Be brief."), "conversation_unfit", "system prompt"),
        ({"conversations": talk("Hm?", "Both."), "images": ["a.png", "b.png"]}, "no_usable_face", "set.json"),
    ],
)
def test_what_the_prompts_have_no_place_for_is_refused(tmp_path: Path, record: Record, code: str, fact: str) -> None:
    """Trained on all the same, the model would be asked otherwise in use than it learnt."""
    with raises(code, fact):
        adopt(written(tmp_path, record), tmp_path / "set")


@pytest.mark.slow
def test_training_takes_conversations_as_is(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a row, a split or a card of ours; and the adapter is asked as its conversations asked."""
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
    base = tiny.write_base(tmp_path / "base", tiny.processor_of_llava_15(), tied=False)
    settings = {"base": str(base), "lora_r": 4, "lr": 1e-2, "accumulate": 1, "max_steps": 2}
    plain = FinetuneConfig(str(photos / "train.json"), str(photos), str(tmp_path / "adapter"), **settings)  # type: ignore[arg-type]
    with raises("conversation_unfit", "--experts"):
        train(plain)
    made = adopt(photos / "train.json", tmp_path / "set", experts=f"blending={tiny.EXPERT}")
    train(replace(plain, instructions=str(made), manifest=str(made.parent / "manifest.jsonl")))
    card = read_adapter_card(tmp_path / "adapter")
    assert list(card.experts) == [tiny.EXPERT] and card.aliases == {tiny.EXPERT: "blending"}
    unscored = written(tmp_path, about(str(photos / "1.png"), "Hm?", "This image is fake."))
    train(replace(plain, instructions=str(unscored), manifest=str(photos), out=str(tmp_path / "bare")))
    assert read_adapter_card(tmp_path / "bare").experts == {}

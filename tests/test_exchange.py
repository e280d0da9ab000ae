"""Instruction sets go to LLaVA, LLaMA-Factory and ms-swift and come from there: what is trained on must be the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_gen.build import BuildConfig, build
from data_gen.exchange import FORMATS, read, write
from tests import tiny
from x2dfd.crops import load_crops
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.experts import BUILTIN
from x2dfd.tower import seen_view

Record = dict[str, Any]
Turns = list[tuple[str, str]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small manifest, and the folder with its instruction set in every format."""
    import skimage.data

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
        seen = seen_view(data.crops[record["row"]], 1, record["row"])
        with Image.open(pictures[0]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), seen)


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_exported_comes_back(built: tuple[Path, Path], form: str) -> None:
    """Trained there or here, question, answer and what counts as a verdict are the same."""
    records = ours(built[1])
    found = read(built[1] / form / ("train.jsonl" if form == "messages" else "train.json"))
    for record, before in zip(found, records, strict=True):
        assert record["conversations"] == before["conversations"] and record["system"] == ""
        assert record["task"] == ("detect" if before["task"].startswith("detect") else "chat")
        assert Path(record["images"][0]) == built[1] / form / "images" / f"{before['row']:06d}.png"


# --- what others wrote -----------------------------------------------------------------------------------------------


def written(folder: Path, *records: Record, lines: bool = False) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    path = folder / "set.json"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
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
        {
            "messages": [
                {"role": "system", "content": "Look well."},
                {"role": "user", "content": "Hello?"},
                {"role": "assistant", "content": "Hello."},
            ]
        },
        {"conversations": talk("Unmarked?", "Yes", "Why?", "So."), "images": ["b.png"], "system": "Be brief."},
        lines=lines,
    )
    one, two, none, unmarked = read(path)
    assert (one["id"], one["task"], one["images"]) == ("one", "detect", [str(tmp_path / "a.png")])
    assert [Path(p).name for p in two["images"]] == ["a.png", "b.png"] and two["task"] == "chat"
    assert (none["images"], none["system"]) == ([], "Look well.") and none["conversations"] == talk("Hello?", "Hello.")
    assert unmarked["conversations"][0]["value"] == "<image>\nUnmarked?" and unmarked["system"] == "Be brief."


def test_x2dfds_results_are_read_without_their_scores(tmp_path: Path) -> None:
    """Its result files are conversations with two more turns, which nobody answered."""
    turns = [
        *talk("<image>\nIs this image real or fake?", "This image is real."),
        {"from": "real score", "value": "0.6478"},
        {"from": "fake score", "value": "0.3522"},
    ]
    [record] = read(written(tmp_path, {"id": "1", "image": "a.png", "conversations": turns}))
    assert record["conversations"] == turns[:2]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"conversations": talk("Hm?")}, "alternate"),
        ({"conversations": talk("Hm?", "<image>"), "image": "a.png"}, "answer holds a picture"),
        ({"conversations": talk("<image>", "Yes")}, "1 marks <image> for 0 pictures"),
        ({"conversations": talk("<image>", "Yes"), "images": ["a.png", "b.png"]}, "1 marks <image> for 2"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "no speaker"),
        ({"conversations": [{"from": "human", "value": 3}]}, "is a text"),
        ({"conversations": talk("<image>", "Yes"), "image": "gone.png"}, "gone.png"),
        ({"Description": "", "images": ["a.png"]}, "conversations"),
        ("text", "record 0"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(tmp_path: Path, record: Any, told: str) -> None:
    """Trained on all the same, it would teach something that nobody wrote."""
    with pytest.raises(X2DFDError, match=told):
        read(written(tmp_path, record))


def test_files_that_hold_no_conversations_are_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "not JSON", '{"Description": "",\n "images": []}', "[" * 100_000):
        (tmp_path / "set.json").write_text(text)
        with pytest.raises(X2DFDError, match=r"set\.json"):
            read(tmp_path / "set.json")


def test_a_format_that_there_is_not_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'llava'"):
        build(BuildConfig(data="nowhere.csv", format="lava"), tmp_path)

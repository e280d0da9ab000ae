"""Instruction sets as other stacks train on them, and theirs as ours: conversations with their pictures as files.

- llava: a JSON list of `id`, `image` and `conversations`, whose turns are `from` (human, gpt) and `value`; documented
  in haotian-liu/LLaVA, docs/Finetune_Custom_Data.md
- sharegpt: a JSON list of `conversations` and `images`, described in `dataset_info.json`; hiyouga/LLaMA-Factory,
  data/README.md
- messages: JSON Lines of `messages`, with `role` and `content`, and `images` (whole paths); modelscope/ms-swift,
  docs/source_en/Customization/Custom-dataset.md

`<image>` in a question marks a picture's place, as often as there are pictures. X2-DFD's conversation files are in
LLaVA's format; its result files have further turns that hold scores, which nobody says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from x2dfd import prompts
from x2dfd.crops import CropSet
from x2dfd.errors import X2DFDError
from x2dfd.files import Json, parse_json, write_text
from x2dfd.progress import progress
from x2dfd.tower import augmented_view

FORMATS = ("llava", "sharegpt", "messages")
MARK = "<image>"
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
RESULTS = ("real score", "fake score")
"""Turns of X2-DFD's result files that are no talk."""

Record = Json


def write(records: Sequence[Record], data: CropSet, view_seed: int, out: Path, form: str) -> Path:
    """Write the records of `data_gen build` in a format of FORMATS, one file a split, into `out/form`, and the
    augmented views that the questions' scores are about as PNG. Returns the folder."""
    from PIL import Image

    folder = out / form
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in progress(sorted({int(r["row"]) for r in records}), "pictures"):
        Image.fromarray(augmented_view(data.views[row], view_seed, row)).save(folder / _picture(row))
    described: Json = {}
    for split in sorted({str(r["split"]) for r in records}):
        made = [_exported(r, form, folder) for r in records if r["split"] == split]
        if form == "messages":
            text = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in made)
            write_text(folder / f"{split}.jsonl", text)
            continue
        write_text(folder / f"{split}.json", json.dumps(made, indent=1, ensure_ascii=False) + "\n")
        columns = {"messages": "conversations", "images": "images"}
        described[f"x2dfd_{split}"] = {"file_name": f"{split}.json", "formatting": "sharegpt", "columns": columns}
    if form == "sharegpt":
        write_text(folder / "dataset_info.json", json.dumps(described, indent=1) + "\n")
    return folder


def _picture(row: int) -> str:
    return f"images/{row:06d}.png"


def _exported(record: Record, form: str, folder: Path) -> Record:
    turns, picture = record["conversations"], _picture(int(record["row"]))
    if form == "llava":
        return {"id": record["id"], "image": picture, "conversations": turns}
    if form == "sharegpt":
        return {"conversations": turns, "images": [picture]}
    roles = {"human": "user", "gpt": "assistant"}
    said = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    return {"messages": said, "images": [str((folder / picture).resolve())]}


def read(path: Path, pictures: Path | None = None) -> list[Record]:
    """The conversations of a file in any of FORMATS, as records of an instruction set.

    Each has `id`, `task` (`detect` where the last answer begins with a verdict, else `chat`), `label` and `system`
    ("" where nothing is said), `images` (paths, in the order of their marks; none for talk without a picture) and
    `conversations`: human and gpt in turn, the last an answer. Where no question has a mark, the pictures come first.
    `pictures`: the folder that relative paths start at; the file's own where not given. Raises X2DFDError with the
    record that is wrong.
    """
    found: list[Record] = []
    for number, raw in enumerate(_parsed(path)):
        name = str(raw.get("id", number)) if isinstance(raw, dict) else str(number)
        try:
            found.append(_record(name, raw, pictures or path.parent))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise X2DFDError(f"{path}, record {name}: {said}", code="conversation_invalid") from error
    absent = [image for record in found for image in record["images"] if not os.path.isfile(image)]  # of any text
    if absent:
        raise X2DFDError(f"{path}: {len(absent)} pictures are missing, such as {absent[0]}", code="pictures_missing")
    if not found:
        raise X2DFDError(f"{path} holds no conversation", code="no_conversation")
    return found


def _parsed(path: Path) -> list[Json]:
    """A JSON list, or a JSON object a line: what the text is, not what the file is called."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            whole: list[Json] = parse_json(text)
            return whole
        return [parse_json(line) for line in text.split("\n") if line.strip()]  # a text may hold other line ends
    except (OSError, ValueError) as error:
        raise X2DFDError(
            f"{path} is neither a JSON list nor JSON Lines of conversations: {error}", code="conversations_unreadable"
        ) from error


def _record(name: str, raw: Json, root: Path) -> Record:
    """Raises KeyError, TypeError, ValueError or AttributeError for what no format has."""
    turns = raw["messages"] if "messages" in raw else raw["conversations"]
    said = [(_speaker(turn), turn["content"] if "role" in turn else turn["value"]) for turn in turns]
    if any(not isinstance(text, str) for _, text in said):
        raise ValueError("every message must be a text, with <image> in the place of a picture")
    said = [(who, text) for who, text in said if who]
    system = str(raw.get("system") or "")
    if said and said[0][0] == "system":
        system, said = said[0][1], said[1:]
    if not said or [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2):
        raise ValueError(
            f"questions and answers must alternate; found: {', '.join(who for who, _ in said) or 'no message'}"
        )
    given = raw.get("images") or raw.get("image") or []
    images = [str(root / image) for image in ([given] if isinstance(given, str) else given)]
    marks = sum(text.count(MARK) for who, text in said if who == "human")
    if any(MARK in text for who, text in said if who == "gpt"):
        raise ValueError(f"an answer must not hold {MARK}")
    if marks == 0 and images:
        said[0] = ("human", f"{MARK}\n" * len(images) + said[0][1])
    elif marks != len(images):
        raise ValueError(f"it lists {len(images)} pictures, but {MARK} stands in its questions {marks} times")
    return {
        "id": name,
        "task": task_of(said[-1][1]),
        "label": str(raw.get("label") or ""),
        "system": system,
        "images": images,
        "conversations": [{"from": who, "value": text} for who, text in said],
    }


def task_of(answer: str) -> str:
    """What an answer makes of its record: `detect` where it begins with a verdict, else `chat`."""
    return "detect" if answer.startswith(tuple(prompts.STEM + word for word in prompts.LABEL_WORDS)) else "chat"


def _speaker(turn: Json) -> str:
    """human, gpt or system; "" for a score that nobody says."""
    who = str(turn["role"] if "role" in turn else turn["from"])
    if who in RESULTS:
        return ""
    if who not in SPEAKERS:
        raise ValueError(f"unknown speaker {who!r} (known: {', '.join(SPEAKERS)})")
    return SPEAKERS[who]

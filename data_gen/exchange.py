"""Writes instruction sets in the formats of other training stacks and reads theirs: conversations with picture files.

- llava: a JSON list of `id`, `image` and `conversations`, whose turns are `from` (human, gpt) and `value`; documented
  in haotian-liu/LLaVA, docs/Finetune_Custom_Data.md
- sharegpt: a JSON list of `conversations` and `images`, described in `dataset_info.json`; hiyouga/LLaMA-Factory,
  data/README.md
- messages: JSON Lines of `messages`, with `role` and `content`, and `images` (whole paths); modelscope/ms-swift,
  docs/source_en/Customization/Custom-dataset.md

`<image>` in a question marks a picture's place, once for each picture. X2-DFD's conversation files are in LLaVA's
format; its result files have further turns, which hold scores and are no part of the conversation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

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
"""Speakers of turns in X2-DFD's result files that hold scores."""

Record = Json


def write(records: Sequence[Record], data: CropSet, view_seed: int, out: Path, format_name: str) -> Path:
    """Write the records of `data_gen build` in a format of FORMATS, one file for each split, with the augmented views
    that the experts scored as PNG. Returns the folder, `out/format_name`."""
    folder = out / format_name
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in progress(sorted({int(r["row"]) for r in records}), "pictures"):
        Image.fromarray(augmented_view(data.views[row], view_seed, row)).save(folder / _picture_name(row))
    dataset_info: Json = {}
    for split in sorted({str(r["split"]) for r in records}):
        exported = [_export_record(r, format_name, folder) for r in records if r["split"] == split]
        if format_name == "messages":
            text = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in exported)
            write_text(folder / f"{split}.jsonl", text)
            continue
        write_text(folder / f"{split}.json", json.dumps(exported, indent=1, ensure_ascii=False) + "\n")
        columns = {"messages": "conversations", "images": "images"}
        dataset_info[f"x2dfd_{split}"] = {"file_name": f"{split}.json", "formatting": "sharegpt", "columns": columns}
    if format_name == "sharegpt":
        write_text(folder / "dataset_info.json", json.dumps(dataset_info, indent=1) + "\n")
    return folder


def _picture_name(row: int) -> str:
    return f"images/{row:06d}.png"


def _export_record(record: Record, format_name: str, folder: Path) -> Record:
    turns, picture = record["conversations"], _picture_name(int(record["row"]))
    if format_name == "llava":
        return {"id": record["id"], "image": picture, "conversations": turns}
    if format_name == "sharegpt":
        return {"conversations": turns, "images": [picture]}
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    return {"messages": messages, "images": [str((folder / picture).resolve())]}


def read(path: Path, pictures: Path | None = None) -> list[Record]:
    """The conversations of a file in any of FORMATS, as records of an instruction set.

    Each has `id`, `task` (see `task_of`), `label` and `system` ("" if not given), `images` (paths in the order of
    their marks, none for talk without a picture) and `conversations`: human and gpt in turn, an answer last. If no
    question has a mark, the pictures come first. Relative paths start at the folder `pictures`, by default the file's
    own. Raises X2DFDError, which names the faulty record.
    """
    records: list[Record] = []
    for number, raw in enumerate(_parse_file(path)):
        name = str(raw.get("id", number)) if isinstance(raw, dict) else str(number)
        try:
            records.append(_parse_record(name, raw, pictures or path.parent))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise X2DFDError(f"{path}, record {name}: {reason}", code="conversation_invalid") from error
    missing = [image for record in records for image in record["images"] if not os.path.isfile(image)]  # of any text
    if missing:
        raise X2DFDError(f"{path}: {len(missing)} pictures are missing, such as {missing[0]}", code="pictures_missing")
    if not records:
        raise X2DFDError(f"{path} holds no conversation", code="no_conversation")
    return records


def _parse_file(path: Path) -> list[Json]:
    """Parse a JSON list or JSON Lines, told apart by the text and not by the file's name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            records: list[Json] = parse_json(text)
            return records
        return [parse_json(line) for line in text.split("\n") if line.strip()]  # a text may hold other line ends
    except (OSError, ValueError) as error:
        raise X2DFDError(
            f"{path} is neither a JSON list nor JSON Lines of conversations: {error}", code="conversations_unreadable"
        ) from error


def _parse_record(name: str, raw: Json, root: Path) -> Record:
    """Raises KeyError, TypeError, ValueError or AttributeError if the record fits no format."""
    turns = raw["messages"] if "messages" in raw else raw["conversations"]
    messages = [(_role(turn), turn["content"] if "role" in turn else turn["value"]) for turn in turns]
    if any(not isinstance(text, str) for _, text in messages):
        raise ValueError("every message must be a text, with <image> in the place of a picture")
    messages = [(role, text) for role, text in messages if role]
    system = str(raw.get("system") or "")
    if messages and messages[0][0] == "system":
        system, messages = messages[0][1], messages[1:]
    if not messages or [role for role, _ in messages] != ["human", "gpt"] * (len(messages) // 2):
        raise ValueError(
            f"questions and answers must alternate; found: {', '.join(role for role, _ in messages) or 'no message'}"
        )
    listed = raw.get("images") or raw.get("image") or []
    images = [str(root / image) for image in ([listed] if isinstance(listed, str) else listed)]
    marks = sum(text.count(MARK) for role, text in messages if role == "human")
    if any(MARK in text for role, text in messages if role == "gpt"):
        raise ValueError(f"an answer must not hold {MARK}")
    if marks == 0 and images:
        messages[0] = ("human", f"{MARK}\n" * len(images) + messages[0][1])
    elif marks != len(images):
        raise ValueError(f"it lists {len(images)} pictures, but {MARK} stands in its questions {marks} times")
    return {
        "id": name,
        "task": task_of(messages[-1][1]),
        "label": str(raw.get("label") or ""),
        "system": system,
        "images": images,
        "conversations": [{"from": role, "value": text} for role, text in messages],
    }


def task_of(answer: str) -> str:
    """The task of a record by its last answer: `detect` if that begins with a verdict, else `chat`."""
    return "detect" if answer.startswith(tuple(prompts.STEM + word for word in prompts.LABEL_WORDS)) else "chat"


def _role(turn: Json) -> str:
    """human, gpt or system; "" for a turn that holds a score."""
    role = str(turn["role"] if "role" in turn else turn["from"])
    if role in RESULTS:
        return ""
    if role not in SPEAKERS:
        raise ValueError(f"unknown speaker {role!r} (known: {', '.join(SPEAKERS)})")
    return SPEAKERS[role]

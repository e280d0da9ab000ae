"""Public data sets as they lie on disk, of files whose content does not matter: readers look at names and places."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from data_gen.__main__ import app

Clips = Mapping[str, Sequence[str]]
"""The frames of each clip, by the clip's name."""


def command(*words: object) -> Result:
    """What `python -m data_gen` leaves when it is given these words."""
    return CliRunner().invoke(app, [str(word) for word in words])


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def as_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def index(key: str, classes: Mapping[str, Clips], split: str = "test", level: str = "") -> dict[str, Any]:
    """An index of DeepfakeBench; `level`: of compression, where a set has one."""
    made: dict[str, Any] = {}
    for name, clips in classes.items():
        records = {clip: {"label": name, "frames": frames} for clip, frames in clips.items()}
        made[name] = {split: {level: records} if level else records}
    return {key: made}


def indexed(root: Path, file: Path, key: str, classes: Mapping[str, Clips], **options: str) -> Path:
    """The same as a file, with every frame that it lists below `root`."""
    for clips in classes.values():
        for frames in clips.values():
            for frame in frames:
                touch(root / frame)
    return as_json(file, index(key, classes, **options))

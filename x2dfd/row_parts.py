"""Rows of an unfinished run, on disk, so that a run that was cut off resumes where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from x2dfd.files import Json, json_object, write_text


class RowParts:
    """A folder of numbered files of JSON lines. Each begins with a head, which says what the rows belong to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, head: Json, rows: Iterable[Json]) -> None:
        """Store rows as a new last part, whole or not at all."""
        number = 1 + max((int(path.stem) for path in self.folder.glob("*.jsonl")), default=0)
        lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in (head, *rows))
        write_text(self.folder / f"{number:06d}.jsonl", "".join(lines))

    def __iter__(self) -> Iterator[tuple[Json, list[Json]]]:
        """Head and rows of each part, in the order in which they were added."""
        for path in sorted(self.folder.glob("*.jsonl")):
            head, *rows = (json_object(line, path) for line in path.read_text("utf-8").split("\n") if line)
            yield head, rows

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

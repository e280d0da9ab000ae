"""Hugging Face data sets saved with `save_to_disk`, as a manifest: see `data_gen.readers`."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from data_gen.readers import Label, Read, row
from x2dfd.errors import SetupError, UnknownName, X2DFDError
from x2dfd.files import Json, write_bytes
from x2dfd.progress import progress


@dataclass(frozen=True)
class Columns:
    """Which column of a `datasets` table is what, and which of its labels mean real and fake (name or number)."""

    image: str = "image"
    label: str = "label"
    real: tuple[str, ...] = ()
    fake: tuple[str, ...] = ()
    method: str = ""  # empty: no such column
    group: str = ""
    video: str = ""


def read_datasets(folders: Sequence[Path], images: Path, columns: Columns, *, only: Sequence[str] = ()) -> Read:
    """Tables saved with `datasets.save_to_disk`; pictures are written to `images` by the hash of their bytes, which
    stay as they are: encoding again would make a format trace of its own."""
    try:
        import datasets
    except ImportError as error:
        raise SetupError(
            "reading a saved data set needs datasets: pip install 'x2dfd[train]'", code="package_missing"
        ) from error
    if not columns.real and not columns.fake:
        raise X2DFDError("say which labels mean real and fake: --real-value 0 --fake-value 1", code="option_missing")
    read = Read(only)
    for folder in folders:
        try:
            loaded = datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise X2DFDError(
                f"{folder} is not a data set that save_to_disk wrote ({error})", code="dataset_unreadable"
            ) from error
        for split, table in (loaded if isinstance(loaded, dict) else {"": loaded}).items():
            if not read.takes(split):
                continue
            for column in filter(None, (columns.image, columns.label, columns.method, columns.group, columns.video)):
                if column not in table.column_names:
                    raise UnknownName("column", column, table.column_names)
            names = getattr(table.features[columns.label], "names", None)  # of a ClassLabel
            try:
                table = table.cast_column(columns.image, datasets.Image(decode=False))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise X2DFDError(
                    f"{folder}: column {columns.image!r} holds no pictures ({error})", code="column_without_pictures"
                ) from error
            for i, record in enumerate(progress(table, f"pictures of {split or folder.name}")):
                read.listed += 1
                path = _store(record[columns.image], images)
                label = _said(record[columns.label], names, columns, f"{folder.name}: row {i}")
                if path is None:
                    read.lacks(f"{folder.name} {split}".strip(), f"row {i}: no picture in it")
                    continue
                given = {
                    name: str(record[column])
                    for name in ("method", "group", "video")
                    if (column := getattr(columns, name)) and record[column] not in (None, "")
                }
                method = given.get("method", "") if label == "fake" else ""
                known = [f"{folder.name}/{given['group']}"] if "group" in given else ()
                whose = {"source": folder.name, "method": method, "split": split}
                sample = row(path, path.name, label, clip=False, sources=known, **whose)
                clip = f"{folder.name}/{label}/{given['video']}" if "video" in given else None
                read.samples.append(replace(sample, video=clip))
    return read


def _said(value: object, names: Sequence[str] | None, columns: Columns, where: str) -> Label:
    """The label that the user gives to a value, by the value itself or by its class name."""
    said = {str(value)}
    if names and isinstance(value, int) and 0 <= value < len(names):
        said.add(names[value])
    real, fake = bool(said & set(columns.real)), bool(said & set(columns.fake))
    if real == fake:
        raise X2DFDError(
            f"{where}: label {'/'.join(sorted(said))} is {'both real and' if real else 'neither real nor'} fake",
            code="label_unclear",
        )
    return "real" if real else "fake"


def _store(image: Json | None, folder: Path) -> Path | None:
    """Writes a picture's bytes as they are, named by their SHA-256; None when it is none."""
    try:
        data = image and (image["bytes"] or (Path(image["path"]).read_bytes() if image["path"] else None))
        suffix = (Image.open(io.BytesIO(data)).format or "").lower() if data else ""
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if not data or not suffix:
        return None
    digest = hashlib.sha256(data).hexdigest()
    path = folder.absolute() / digest[:2] / f"{digest}.{'jpg' if suffix == 'jpeg' else suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    return path

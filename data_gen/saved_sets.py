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
    """The columns of a `datasets` table by their use, and its labels that mean real or fake (name or number)."""

    image: str = "image"
    label: str = "label"
    real: tuple[str, ...] = ()
    fake: tuple[str, ...] = ()
    method: str = ""  # empty: no such column
    group: str = ""
    video: str = ""


def read_datasets(folders: Sequence[Path], images: Path, columns: Columns, *, only: Sequence[str] = ()) -> Read:
    """Read tables saved with `datasets.save_to_disk`. Pictures are written to `images` under the hash of their bytes,
    which stay unchanged, as another encoding would leave a trace of its own."""
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
            dataset = datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise X2DFDError(
                f"{folder} is not a data set that save_to_disk wrote ({error})", code="dataset_unreadable"
            ) from error
        for split, table in (dataset if isinstance(dataset, dict) else {"": dataset}).items():
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
                path = _store_picture(record[columns.image], images)
                label = _label_of(record[columns.label], names, columns, f"{folder.name}: row {i}")
                if path is None:
                    read.lacks(f"{folder.name} {split}".strip(), f"row {i}: no picture in it")
                    continue
                details = {
                    name: str(record[column])
                    for name in ("method", "group", "video")
                    if (column := getattr(columns, name)) and record[column] not in (None, "")
                }
                method = details.get("method", "") if label == "fake" else ""
                sources = [f"{folder.name}/{details['group']}"] if "group" in details else ()
                fields = {"source": folder.name, "method": method, "split": split}
                sample = row(path, path.name, label, clip=False, sources=sources, **fields)
                clip = f"{folder.name}/{label}/{details['video']}" if "video" in details else None
                read.samples.append(replace(sample, video=clip))
    return read


def _label_of(value: object, names: Sequence[str] | None, columns: Columns, where: str) -> Label:
    """The label that the user gives to a value, by the value itself or by its class name."""
    spellings = {str(value)}
    if names and isinstance(value, int) and 0 <= value < len(names):
        spellings.add(names[value])
    real, fake = bool(spellings & set(columns.real)), bool(spellings & set(columns.fake))
    if real == fake:
        raise X2DFDError(
            f"{where}: label {'/'.join(sorted(spellings))} is {'both real and' if real else 'neither real nor'} fake",
            code="label_unclear",
        )
    return "real" if real else "fake"


def _store_picture(image: Json | None, folder: Path) -> Path | None:
    """Write a picture's bytes unchanged, named by their SHA-256; None if they are no picture."""
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

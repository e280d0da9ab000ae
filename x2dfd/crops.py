"""The aligned face crops of a manifest for trainings and assessments, computed once and saved."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tokenize import TokenError
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from x2dfd.errors import InputError, X2DFDError
from x2dfd.faces import CROP_SIZE, align, find_faces, preprocessing
from x2dfd.fetch import cache_dir
from x2dfd.files import atomic_write, locked_folder, read_json, write_text
from x2dfd.manifest import Sample, manifest_sha256, read_manifest
from x2dfd.media import load_picture
from x2dfd.progress import progress
from x2dfd.types import Face

S = TypeVar("S", bound=np.generic)

MASK_SIZE = 56
"""Side of a mask on the crop's grid: a quarter of the crop's."""


@dataclass(frozen=True, eq=False)
class CropSet:
    """Crops of the largest face of each usable file of a manifest."""

    samples: list[Sample]
    crops: NDArray[np.uint8]  # [n, CROP_SIZE, CROP_SIZE, 3], memory-mapped
    landmarks: NDArray[np.float32]  # [n, 468, 2] in crop pixels
    unusable: dict[str, str]  # sample id -> reason
    masks: NDArray[np.uint8] | None = None  # [n, MASK_SIZE, MASK_SIZE], 0..255 where the forgery is; 0 without a mask
    large: NDArray[np.uint8] | None = None  # [n, s, s, 3], for an MLLM that takes larger ones; memory-mapped

    @property
    def views(self) -> NDArray[np.uint8]:
        """The crops that the MLLM sees."""
        return self.crops if self.large is None else self.large

    def where(self, **equal: str) -> NDArray[np.intp]:
        """Indices of the samples whose fields have the given values."""
        return np.flatnonzero([all(getattr(s, k) == v for k, v in equal.items()) for s in self.samples])

    def lost(self, wanted: Sequence[str] | None = None) -> str | None:
        """A sentence on the samples without a usable face, among those of the `wanted` ids; None where all have one."""
        wanted = [*(s.id for s in self.samples), *self.unusable] if wanted is None else wanted
        if not (lost := [name for name in wanted if name in self.unusable]):
            return None
        example = f"{lost[0]}, {self.unusable[lost[0]]}" + (", and others" if len(lost) > 1 else "")
        return f"{len(lost)} of {len(wanted)} pictures not used: no usable face ({example})"


Cropped = tuple[Face, NDArray[np.uint8] | None]
"""A face, and its mask where the sample has one."""


def _crop(paths: tuple[str, str | None, int]) -> Cropped | str:
    cv2.setNumThreads(1)
    path, mask, side = paths
    try:
        pixels = load_picture(path).pixels
        faces = find_faces(pixels, side)
        if not faces:
            return "no_face"
    except InputError as error:
        return error.code
    return faces[0], _load_mask(mask, pixels, faces[0].landmarks) if mask else None


def _load_mask(path: str, pixels: NDArray[np.uint8], landmarks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The mask file on the grid of the face's crop. Raises X2DFDError when it is unreadable or fits another picture."""
    try:
        mask = load_picture(path).pixels[..., 0]
    except InputError as error:
        raise X2DFDError(f"mask {path}: {error}", code="mask_unreadable") from error
    if mask.shape != pixels.shape[:2]:
        raise X2DFDError(f"mask {path} is not of the size of its picture", code="mask_size_differs")
    return mask_on_crop(mask, pixels, landmarks)


def mask_on_crop(
    mask: NDArray[np.uint8], pixels: NDArray[np.uint8], landmarks: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """A picture's mask [H, W], 0..255, on the grid of a face's crop: [MASK_SIZE, MASK_SIZE], means of areas.

    `pixels` [H, W, 3] is the picture, `landmarks` [468, 2] the face's mesh in its pixels.
    """
    _, matrix = align(pixels, landmarks)
    crop = cv2.warpAffine(mask, matrix, (CROP_SIZE, CROP_SIZE))
    return np.asarray(cv2.resize(crop, (MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_AREA), np.uint8)


def load_crops(manifest: Path, workers: int = 1, side: int = CROP_SIZE) -> CropSet:
    """Read the crops beside `manifest`, and compute them first if they are absent or belong to other files.

    Where its folder cannot be written, they are in the cache of x2dfd. `side` is that of the crops that the MLLM sees.
    Raises X2DFDError when no file of the manifest has a usable face.
    """
    samples = read_manifest(manifest)
    folder = manifest.parent / f".crops-{manifest.stem}{'' if side == CROP_SIZE else f'-{side}'}"
    key = {"manifest": manifest_sha256(manifest), "files": _file_states(samples), "preprocessing": preprocessing(side)}
    key["masks"] = str(MASK_SIZE)
    data = _saved(samples, folder, key, side)
    if data is None and not os.access(folder if folder.exists() else manifest.parent, os.W_OK):
        place = hashlib.sha256(os.path.abspath(manifest).encode()).hexdigest()[:16]
        folder = cache_dir() / "crops" / f"{place}{folder.name}"
        data = _saved(samples, folder, key, side)
    if data is None:
        with locked_folder(folder, wait=True):
            data = _saved(samples, folder, key, side)  # another process may have made them in the meantime
            if data is None:
                _compute(samples, folder, key, workers, side)
                data = _saved(samples, folder, key, side)
    assert data is not None
    if not data.samples:
        raise X2DFDError(f"{manifest}: no file has a usable face", code="no_usable_face")
    return data


def load_sets(
    manifests: Sequence[Path],
    workers: int = 1,
    side: int = CROP_SIZE,
    on_remark: Callable[[str], None] = lambda line: None,
) -> list[CropSet]:
    """The crops of each manifest. `on_remark` gets a sentence on each manifest whose pictures are not all used. Raises
    X2DFDError for a picture in two of them, as it would count twice."""
    manifest_of: dict[Path, Path] = {}
    for manifest in manifests:
        for sample in read_manifest(manifest):
            if sample.path in manifest_of:
                raise X2DFDError(
                    f"{sample.path} is in {manifest_of[sample.path]} and again in {manifest}: it would count twice",
                    code="manifest_path_twice",
                )
            manifest_of[sample.path] = manifest
    sets = [load_crops(path, workers, side) for path in manifests]
    for path, crops in zip(manifests, sets, strict=True):
        if lost := crops.lost():
            on_remark(f"{path}: {lost}")
    return sets


def _saved(samples: Sequence[Sample], folder: Path, key: dict[str, str], side: int) -> CropSet | None:
    """The crops in a folder; None where they are absent, damaged or of other files."""
    try:
        contents = read_json(folder / "index.json")
    except (OSError, X2DFDError):
        return None
    unusable = contents.get("unusable")
    if contents.get("key") != key or not isinstance(unusable, dict):
        return None
    usable = [s for s in samples if s.id not in unusable]
    n = len(usable)
    crops = old_array(folder / "crops.npy", np.uint8, (len(samples), CROP_SIZE, CROP_SIZE, 3))
    landmarks = old_array(folder / "landmarks.npy", np.float32, (n, 468, 2))
    masks = old_array(folder / "masks.npy", np.uint8, (n, MASK_SIZE, MASK_SIZE))
    large = None if side == CROP_SIZE else old_array(folder / "large.npy", np.uint8, (len(samples), side, side, 3))
    if crops is None or landmarks is None or masks is None or (large is None and side != CROP_SIZE):
        return None
    large = large if large is None else large[:n]
    return CropSet(usable, crops[:n], np.array(landmarks), unusable, masks, large)  # the unusable ones leave a tail


def old_array(file: Path, kind: type[S], shape: tuple[int, ...]) -> NDArray[S] | None:
    """An array file, mapped for reading; None where it is absent, cut off, or of another kind. `shape` may lack its
    last sizes."""
    try:
        array = np.lib.format.open_memmap(file, "r")
    except (OSError, ValueError, SyntaxError, TokenError):  # what numpy raises for a file that is none of its own
        return None
    return array if array.dtype == kind and array.shape[: len(shape)] == shape else None


def new_array(file: Path, kind: type[S], shape: tuple[int, ...]) -> np.memmap[tuple[int, ...], np.dtype[S]]:
    """An array file, mapped for writing. Raises X2DFDError, `cannot_write`, when the disk has no space for all of it.

    Without that, the kernel would kill a run that writes to a mapped file on a full disk, without a message.
    """
    try:
        array = np.lib.format.open_memmap(file, "w+", kind, shape)
        if hasattr(os, "posix_fallocate"):
            with file.open("r+b") as stream:
                _reserve(stream.fileno(), file.stat().st_size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise X2DFDError(f"cannot write {file}: {error.strerror or error}", code="cannot_write") from error
    return array


def _reserve(handle: int, size: int) -> None:
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of a file system that cannot do it
            raise


def _crop_all(paths: Sequence[tuple[str, str | None, int]], workers: int) -> Iterator[Cropped | str]:
    if workers <= 1:
        yield from map(_crop, paths)
        return
    # Spawned, not forked: a forked copy of a process with running threads hangs.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(_crop, paths, chunksize=16)


def _file_states(samples: Sequence[Sample]) -> str:
    """A hash that changes when a file is replaced under its old name."""
    digest = hashlib.sha256()
    for sample in samples:
        for path in (sample.path, sample.mask):
            info = path.stat() if path is not None and path.exists() else None
            digest.update(f"{path}:{(info.st_size, info.st_mtime_ns) if info else None}\n".encode())
    return digest.hexdigest()


def _compute(samples: list[Sample], folder: Path, key: dict[str, str], workers: int, side: int) -> None:
    (folder / "index.json").unlink(missing_ok=True)
    sides = {"crops": CROP_SIZE} | ({} if side == CROP_SIZE else {"large": side})
    part_files = {name: folder / f"{name}.part.npy" for name in sides}
    try:
        arrays = {name: new_array(part_files[name], np.uint8, (len(samples), s, s, 3)) for name, s in sides.items()}
        landmarks, masks, unusable = _fill(arrays, samples, workers, side)
        for name, crops in arrays.items():
            crops.flush()
            os.replace(part_files[name], folder / f"{name}.npy")
    finally:
        for part_file in part_files.values():
            part_file.unlink(missing_ok=True)
    for name, array in (("landmarks", landmarks), ("masks", masks)):
        with atomic_write(folder / f"{name}.npy") as temporary, temporary.open("wb") as stream:
            np.save(stream, array)
    write_text(folder / "index.json", json.dumps({"key": key, "unusable": unusable}, indent=1))


def _fill(
    arrays: Mapping[str, NDArray[np.uint8]], samples: Sequence[Sample], workers: int, side: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8], dict[str, str]]:
    """Put the crops of the usable samples into the arrays; landmarks and masks of these, and why the others are not."""
    landmarks = np.zeros((len(samples), 468, 2), np.float32)
    masks = np.zeros((len(samples), MASK_SIZE, MASK_SIZE), np.uint8)
    unusable: dict[str, str] = {}
    n = 0
    results = _crop_all([(str(s.path), str(s.mask) if s.mask else None, side) for s in samples], workers)
    for sample, result in zip(samples, progress(results, "cropping", len(samples)), strict=True):
        if isinstance(result, str):
            unusable[sample.id] = result
        else:
            face, mask = result
            arrays["crops"][n] = face.crop
            if "large" in arrays:
                arrays["large"][n] = face.view
            landmarks[n] = face.crop_landmarks
            if mask is not None:
                masks[n] = mask
            n += 1
    return landmarks[:n], masks[:n], unusable

"""Files in object stores, at addresses that fsspec opens (s3://, gs://, hf://, file:// ...), and pipes.

Stores are read only where a caller names them: `x2dfd detect --remote s3,gs`. The user provides a store's package
(s3fs, gcsfs ...) and keys.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from x2dfd.errors import InputError, SetupError
from x2dfd.sniffing import MAX_BYTES
from x2dfd.types import Failure, Report

if TYPE_CHECKING:
    from x2dfd.detector import Detector
    from x2dfd.remote import ServerDetector

    Place = Path | str  # a local path, or an address in a store, or a pipe's path

STDIN = "-"


def is_address(text: str, stores: Collection[str]) -> bool:
    """Whether the text is an address in one of `stores` (s3, gs ...).

    A manifest may be a stranger's, so files in any other store, or behind a chain of stores, are not opened.
    """
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme in stores and "::" not in text


def read_address(address: str) -> bytes:
    """The file's bytes. Raises InputError if the store does not give it, SetupError without the store's package."""
    data = _read_store(address) if "://" in address else _read_pipe(address)
    if len(data) > MAX_BYTES:
        raise InputError("file_too_large", f"more than {MAX_BYTES:,} bytes")
    return data


def _read_store(address: str) -> bytes:
    try:
        import fsspec
    except ImportError as error:
        raise SetupError(
            "addresses need the package fsspec: pip install 'x2dfd[ray]'", code="package_missing"
        ) from error
    try:
        with fsspec.open(address, "rb") as file:
            return bytes(file.read(MAX_BYTES + 1))
    except ImportError as error:  # fsspec names the package
        raise SetupError(str(error), code="address_invalid") from error
    except FileNotFoundError as error:
        raise InputError("not_found", "there is no such file") from error
    except Exception as error:  # every store has errors of its own; fsspec gives them no common base
        raise InputError("unreadable", f"the store does not give the file: {error}") from error


def is_pipe(path: Path) -> bool:
    """Whether a path is `-` (standard input, where no file has that name) or a named pipe: both are read only once."""
    if str(path) == STDIN:
        return not path.exists()
    try:
        return path.is_fifo()
    except OSError:
        return False


@cache
def _read_pipe(path: str) -> bytes:
    """The bytes of a pipe, cached, as judging, hashing and the report all need them."""
    try:
        if path == STDIN:
            if sys.stdin is None:  # as after `<&-`
                raise InputError("unreadable", "standard input is closed")
            return sys.stdin.buffer.read(MAX_BYTES + 1)
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError("unreadable", f"the pipe cannot be read: {error.strerror}") from error


def sha256_of(place: Place) -> str | None:
    """SHA-256 of the file's bytes; None when there is no such file. Raises OSError when it cannot be read."""
    from x2dfd.files import file_sha256

    if isinstance(place, Path):
        return file_sha256(place) if place.is_file() else None
    try:
        return hashlib.sha256(read_address(place)).hexdigest()
    except InputError as error:
        raise OSError(error.reason) from error


class Judging(TypedDict, total=False):
    """Options of `Detector.detect_many`."""

    batch_size: int
    rationale: bool
    frames: int


def detect_places(
    detector: Detector | ServerDetector, places: Iterable[Place], **options: Unpack[Judging]
) -> Iterator[Report | Failure]:
    """Detector.detect_many with its options over local paths and addresses; a result's `path` is the place as given."""
    pending: deque[tuple[Place, Failure | None]] = deque()

    def sources() -> Iterator[Path | bytes]:
        for place in places:
            try:
                source = place if isinstance(place, Path) else read_address(place)
            except InputError as error:
                pending.append((place, Failure(str(place), None, error.code, error.reason)))
            else:
                pending.append((place, None))
                yield source

    for result in detector.detect_many(sources(), **options):
        while (failure := pending[0][1]) is not None:
            pending.popleft()
            yield failure
        yield replace(result, path=str(pending.popleft()[0]))
    yield from (failure for _, failure in pending if failure is not None)

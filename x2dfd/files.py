"""Helpers that hash files, write them whole or not at all, and read JSON from untrusted sources."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
import sys
import tempfile
import threading
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from x2dfd.errors import X2DFDError

T = TypeVar("T")
Json = dict[str, Any]
"""A JSON object: plain values by name."""

MAX_DEPTH = 100  # of nested lists and objects
MAX_DIGITS = 300  # of an integer; no float holds a longer one


def parse_json(text: str | bytes) -> Any:
    """Untrusted JSON as plain values; bytes are UTF-8, with a BOM or without.

    Raises ValueError with a one-line reason for text that is not JSON, and for values that later code could fail on:
    nesting beyond MAX_DEPTH, whole numbers of more than MAX_DIGITS digits, a key twice in one object, NaN and Infinity.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_bounded_int, parse_constant=_reject_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def json_object(text: str | bytes, where: object) -> Json:
    """The JSON object in a file that this project wrote, which may have been cut off or changed by hand.

    `where` names the file. Raises X2DFDError, `json_unreadable`.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        raise X2DFDError(f"{where} cannot be read ({error})", code="json_unreadable") from error
    if not isinstance(value, dict):
        raise X2DFDError(f"{where} holds no JSON object", code="json_unreadable")
    return value


def read_json(path: Path) -> Json:
    """`json_object` of a file. Raises OSError too."""
    return json_object(path.read_bytes(), path)


def _object(pairs: list[tuple[str, object]]) -> Json:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {duplicate[:60]!r} occurs twice in one object")
    return result


def _reject_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not a JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def check_fields(kind: Any, data: object) -> None:
    """Raises ValueError, with the place, unless plain values out of a file fit the dataclass `kind`.

    They have its fields and no others, each of its type; a list stands for a tuple, and numbers are finite.
    """
    if not isinstance(data, dict):
        raise ValueError(f"not an object but {type(data).__name__}")
    types = _types(kind)
    for field in fields(kind):
        if field.name in data:
            _check_type(data[field.name], types[field.name], field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"it has no {field.name!r}")
    if unknown := sorted(data.keys() - types.keys()):
        raise ValueError(f"it has {unknown[0][:60]!r}, which is not known here")


_types = cache(get_type_hints)


def checked(kind: type[T], data: object) -> T:
    """The dataclass `kind` from plain values out of a file. Raises ValueError as `check_fields`."""
    check_fields(kind, data)
    return to_dataclass(kind, cast(Json, data))


def to_dataclass(kind: type[T], data: Json) -> T:
    """The dataclass `kind` from its fields as plain values: objects become dataclasses, lists become tuples."""
    types = _types(cast(Hashable, kind))
    return kind(**{name: _to_type(types[name], value) for name, value in data.items()})


def _to_type(kind: Any, value: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _to_type(next((item_kind for item_kind in args if _fits(value, item_kind)), object), value)
    if origin is dict:
        return {key: _to_type(args[1], item) for key, item in value.items()}
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(_to_type(item_kind, item) for item_kind, item in zip(kinds, value, strict=True))
    return to_dataclass(cast(type, kind), value) if is_dataclass(kind) else value


def _check_type(value: object, kind: Any, where: str) -> None:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if not any(_fits(value, option) for option in args):
            raise ValueError(f"{where!r} holds {_short(value)}")
    elif origin is Literal:
        if value not in args:
            raise ValueError(f"{where!r} is none of {', '.join(map(str, args))} but {_short(value)}")
    elif origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where!r} is not an object but {_short(value)}")
        for key, item in value.items():
            _check_type(item, args[1], f"{where}.{key}"[:80])
    elif origin in (tuple, list):
        fixed = origin is tuple and args[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (fixed and len(value) != len(args)):
            raise ValueError(f"{where!r} is not a list of the right length but {_short(value)}")
        for index, item in enumerate(value):
            _check_type(item, args[index if fixed else 0], f"{where}[{index}]")
    elif is_dataclass(kind):
        check_fields(kind, value)
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where!r} is not a finite number but {_short(value)}")
    elif kind is not Any and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
        raise ValueError(f"{where!r} is not of type {kind.__name__} but {_short(value)}")


def _fits(value: object, kind: Any) -> bool:
    try:
        _check_type(value, kind, "")
    except ValueError:
        return False
    return True


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def bad_rate(data: object, names: Collection[str], where: str = "") -> str | None:
    """The place of the first value under one of `names`, at any depth, that is no rate: one number from 0 to 1.

    Under the name `interval`, it is two of them in order, or None where there is no interval.
    """
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in items:
        place = f"{where}.{key}".lstrip(".")
        if key in names and not (key == "interval" and value is None):
            length = 2 if key == "interval" else 1
            ends = value if length == 2 and isinstance(value, list | tuple) else [value]
            numbers = all(type(end) in (int, float) and 0 <= end <= 1 for end in ends)
            if len(ends) != length or not numbers or ends[0] > ends[-1]:
                return place
        elif key not in names and (bad_place := bad_rate(value, names, place)) is not None:
            return bad_place
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(value: object) -> str:
    """SHA-256 of plain values, in hexadecimal: independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file to write in the `with` block, which then replaces `path`; an exception leaves `path` unchanged.

    The new file has the rights of the old one, or those that the user's umask leaves. A link stays, and its target is
    replaced. The folder must exist. Raises OSError where writing is not possible.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o600 if path.exists() else 0o666))
    try:
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # safetensors puts a private file of its own there
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its folder must exist. Raises OSError where writing is not possible."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def locked_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder, which is made if absent, against other processes that use this function during the block.

    The others raise X2DFDError, `folder_locked`. With `wait`, for results that all of them would make alike, they print
    that they wait, and resume afterwards. Raises OSError where the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # it stays, as two processes could enter after its removal
    try:
        lock.acquire(timeout=1)
    except Timeout:
        if not wait:
            raise X2DFDError(
                f"another run is writing into {folder}: wait for it, or give another folder", code="folder_locked"
            ) from None
        print(f"waiting for another run, which fills {folder}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


_STDERR = threading.Lock()  # with two threads inside, the later one would restore the earlier one's redirection


@contextmanager
def printed_from_c(pattern: re.Pattern[bytes], matches: list[bytes]) -> Iterator[None]:
    """Keep lines that match `pattern` off stderr during the block, and append them to `matches` at its end.

    A library prints them on file descriptor 2 from C. Other lines, perhaps of another thread, follow after the block.
    """
    with _STDERR:
        sys.stderr.flush()
        try:
            original_stderr = os.dup(2)
        except OSError:  # a service without stderr
            yield
            return
        with tempfile.TemporaryFile() as messages, open(original_stderr, "wb") as stderr:
            os.dup2(messages.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(original_stderr, 2)
                messages.seek(0)
                lines = messages.read().splitlines(keepends=True)
                matches += [line for line in lines if pattern.match(line)]
                stderr.writelines(line for line in lines if not pattern.match(line))

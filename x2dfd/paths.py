"""Finds local files by name and opens or refuses them, before any decoder is imported."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from x2dfd.errors import InputError
from x2dfd.sniffing import check_bytes

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")  # two letters or more: "C:" is a drive


@contextmanager
def open_source(source: str | Path | bytes) -> Iterator[tuple[BinaryIO, str | None]]:
    """An open local file (or bytes as a file) and its path. Raises InputError with the codes of x2dfd.media."""
    if isinstance(source, bytes):
        check_bytes(len(source))
        yield io.BytesIO(source), None
        return
    path = str(source)
    exists = os.path.lexists(path) if "\0" not in path else False
    if "://" in path or (_SCHEME.match(path) and not exists):
        raise InputError("url_not_allowed", "only local files are read: save the picture to this machine first")
    try:
        info = os.stat(path)
        # checked before opening: opening a pipe would wait for its other end
        if not stat.S_ISREG(info.st_mode):
            raise InputError("not_a_file", "this is not a regular file")
        check_bytes(info.st_size)
        file = open(path, "rb")  # noqa: SIM115 - closed below; only the opening belongs inside this try
    except ValueError as error:  # a NUL in the name
        raise InputError("not_found", "there is no such file") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError("not_found", "the path is longer than this system can open") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise InputError("not_found", "there is no such file") from error
        raise InputError("unreadable", f"the file cannot be read: {error.strerror}") from error
    with file:
        yield file, path


def shown_names(paths: Sequence[str | None]) -> list[str | None]:
    """What a report calls its files: their names or, of several, the paths from their common folder.

    A report is passed on, and the folders above may name a person or a source. Files that share no folder get as much
    of their paths as tells them apart.
    """
    found = {path: Path(path) for path in paths if path not in (None, "-")}
    if len({path.is_absolute() for path in found.values()}) > 1:
        found = {name: Path.cwd() / path for name, path in found.items()}
    folders = [path.parent.parts for path in found.values()]
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))
    kept = {name: path.parts[shared:] for name, path in found.items()}
    if len(found) > 1 and shared < 2 and next(iter(found.values())).is_absolute():  # nothing but the root
        longest = max(len(parts) for parts in kept.values())
        for n in range(1, longest + 1):
            kept = {name: path.parts[1:][-n:] for name, path in found.items()}
            if len(set(kept.values())) == len({path.parts for path in found.values()}):
                break
    return [path if path not in kept else "/".join(kept[path]) or path for path in paths]


def find_media(
    paths: Iterable[str | Path], *, left_out: Callable[[Path], object] = lambda path: None
) -> Iterator[Path]:
    """Yield files as they are, and every regular file under each folder, in sorted order.

    Hidden files and folders are left out. So are links to folders and links out of the folder; `left_out` is called
    with each of them. Files that are no pictures, absent or unreadable are yielded, as each becomes an error row.
    """
    for entry in paths:
        path = Path(entry)
        try:
            folder = path.is_dir()
        except OSError:  # below a folder that may not be read, or a name that is too long
            folder = False
        if folder:
            yield from _walk(path, left_out)
        else:
            yield path


def _walk(top: Path, left_out: Callable[[Path], object]) -> Iterator[Path]:
    root = top.resolve()
    names = _names(top)
    if names is None:
        yield top  # loading it fails with a reason, which is the row that the user needs
        return
    open_folders = [(top, names)]  # not by recursion: a folder may be thousands deep
    while open_folders:
        folder, names = open_folders[-1]
        if not names:
            open_folders.pop()
            continue
        path = folder / names.pop()
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:  # gone since it was listed
            continue
        except OSError:
            yield path  # as above
            continue
        if stat.S_ISDIR(mode):
            subfolder_names = _names(path)
            if subfolder_names is None:
                yield path
            else:
                open_folders.append((path, subfolder_names))
        elif stat.S_ISLNK(mode) and not (path.is_file() and path.resolve().is_relative_to(root)):
            left_out(path)
        elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            yield path


def _names(folder: Path) -> list[str] | None:
    """The visible names in a folder, from last to first; None if it may not be read."""
    try:
        names = os.listdir(folder)  # names alone: of a million files scandir's entries are hundreds of MB
    except OSError:
        return None
    return sorted((name for name in names if not name.startswith(".")), reverse=True)

"""The error classes: every error that a user can cause is one of these, with the reason in plain words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class X2DFDError(Exception):
    """Base of all errors that this project raises on purpose: a stable `code` for machines, a message for people."""

    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    @property
    def line(self) -> str:
        """One line for a terminal: the code, then the message."""
        return f"error [{self.code}]: {self}"


class SetupError(X2DFDError):
    """Something is not installed or not fetched; the message ends with the command that mends it."""

    code = "setup"


class InputError(X2DFDError):
    """A file (or a request) cannot be judged: its code (`not_an_image`, `too_large`, ...) and the reason for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{reason} [{code}]", code=code)
        self.reason = reason

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        return InputError, (self.code, self.reason)  # pickled with the arguments of __init__, not the message

    @property
    def line(self) -> str:
        return f"error [{self.code}]: {self.reason}"


class UnknownName(X2DFDError):
    """A name that is not registered, with the nearest names that are."""

    code = "unknown_name"

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        self._arguments = (kind, name, names)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {', '.join(names) or 'none'})")
        self.name = name

    def __reduce__(self) -> tuple[type[UnknownName], tuple[str, str, list[str]]]:
        return UnknownName, self._arguments


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, as some of transformers begin with an empty one."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def one_file(doing: str) -> Iterator[None]:
    """Turn any exception that a file causes in a library into an InputError, so that a run goes on without the file.

    Hostile bytes make libraries raise nearly anything, and a plug-in may even raise SystemExit. This project's errors
    and a user's interrupt pass. Codes: `out_of_memory`, `too_deep`, `failed`.
    """
    try:
        yield
    except (X2DFDError, KeyboardInterrupt, GeneratorExit):
        raise
    except MemoryError as error:
        raise InputError("out_of_memory", f"{doing} needs more memory than there is") from error
    except RecursionError as error:
        raise InputError("too_deep", f"{doing} failed: the file is nested too deeply") from error
    except BaseException as error:
        summary = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError("failed", f"{doing} failed unexpectedly ({summary})") from error

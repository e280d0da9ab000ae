"""How a test asks for an error of ours: by its code and by the facts in its text, so that the words may change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from x2dfd.errors import X2DFDError


@contextmanager
def raises(code: str, *facts: object) -> Iterator[pytest.ExceptionInfo[X2DFDError]]:
    """The block ends in an X2DFDError of this code, whose text holds each fact: a path, a number, a name, a command."""
    with pytest.raises(X2DFDError) as caught:
        yield caught
    says(caught.value, code, *facts)


def says(error: object, code: str, *facts: object) -> None:
    """The same of an error that was caught already, such as the exception of a command's result."""
    assert isinstance(error, X2DFDError), repr(error)
    assert error.code == code, f"{error.code!r} instead of {code!r}: {error}"
    absent = [str(fact) for fact in facts if str(fact) not in str(error)]
    assert not absent, f"{absent} not in: {error}"

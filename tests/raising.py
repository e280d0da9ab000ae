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
    told = str(caught.value)
    assert caught.value.code == code, f"{caught.value.code!r} instead of {code!r}: {told}"
    absent = [str(fact) for fact in facts if str(fact) not in told]
    assert not absent, f"{absent} not in: {told}"

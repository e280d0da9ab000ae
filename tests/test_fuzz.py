"""Some hundred mutants for each parser, and not for long: `make fuzz` runs more of them."""

from __future__ import annotations

import pytest

from tests import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_mutant_crashes_hangs_or_eats_memory(name: str) -> None:
    """A small FLV ended a run with a traceback; a deeply nested card did the same to every command."""
    found = fuzz.run(name, most=500, seconds=5.0)
    assert found.read and not found.findings, [what for what, _ in found.findings]


def test_a_finding_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that swallows what it should find makes every parser look sound."""
    code, cpu, _ = fuzz.measured("manifest.csv", b"path,label\na.png,real\n")
    assert code == "" and cpu < fuzz.CPU_SECONDS
    assert fuzz.measured("manifest.csv", b"nothing")[0] not in ("", "failed")

    def broken(data: bytes) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setitem(fuzz.TARGETS, "broken", fuzz.Target(lambda: [b"seed"], broken))
    assert fuzz.measured("broken", b"")[0].startswith("unexpected: IndexError")
    few = [data for data, _ in zip(fuzz.mutants(fuzz.TARGETS["broken"], 1), range(40), strict=False)]
    again = [data for data, _ in zip(fuzz.mutants(fuzz.TARGETS["broken"], 1), range(40), strict=False)]
    assert few == again and len(set(few)) > 20

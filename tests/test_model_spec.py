"""One string says which model is meant, and means the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.raising import raises
from x2dfd.model_spec import ModelSpec

URL = "http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("text", "spec", "label"),
    [
        ("embedded", ModelSpec(), "embedded"),
        ("build/adapter", ModelSpec(adapter=Path("build/adapter")), "adapter"),
        ("hub:org/name", ModelSpec(base="org/name"), "base:name"),
        ("hub:org/name+a/b", ModelSpec(base="org/name", adapter=Path("a/b")), "b"),
        (f"org/base:lora@{URL}", ModelSpec(name="org/base:lora", url=URL), "org/base:lora"),
        (f"m@{URL}+a/b", ModelSpec(name="m", url=URL, adapter=Path("a/b")), "m"),
        (f"m@{URL}?requests-per-minute=90", ModelSpec(name="m", url=URL, requests_per_minute=90), "m"),
        (f"m@{URL}?requests-per-minute=0.5+a", ModelSpec(None, Path("a"), "m", URL, requests_per_minute=0.5), "m"),
        ("expert:tower", ModelSpec(expert="tower"), "expert:tower"),
    ],
)
def test_every_form_is_read_and_written(text: str, spec: ModelSpec, label: str) -> None:
    """Bug prevented: a name at an endpoint taken for a folder, or a record whose model cannot be given again."""
    assert ModelSpec.parse(text) == spec and str(spec) == text and spec.label == label


PACES = tuple(f"m@{URL}?requests-per-minute={pace}" for pace in ("", "0", "-1", "nan", "inf", "ten"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hub:",
        "hub:+dir",
        "hub:name+",
        f"@{URL}",
        f"m@{URL}+",
        "expert:",
        "m@http://[",
        "m@http://",
        "m@http://h:x/v1",
        *PACES,
    ],
)
def test_a_part_that_is_missing_is_told(text: str) -> None:
    """Bug prevented: an unset shell variable means another model; an endpoint asked without a limit; a traceback
    for a mistyped address."""
    with raises("model_malformed"):
        ModelSpec.parse(text)


def test_a_process_elsewhere_gets_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a cluster's actor looks for the adapter in its own folder; a hub name becomes a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert ModelSpec.parse("hub:org/name+here").absolute() == ModelSpec(base="org/name", adapter=tmp_path / "here")
    assert str(ModelSpec.parse(f"here@{URL}+there").absolute()) == f"here@{URL}+there"
    # A path is a directory whatever its name, and not the shipped model.
    assert ModelSpec.parse(Path("embedded")) == ModelSpec.parse("./embedded") == ModelSpec(adapter=Path("embedded"))

"""JSON from elsewhere: what no honest file holds is one line, and so is a value of another shape."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.raising import raises
from x2dfd.adapter import read_adapter_card
from x2dfd.experts import read_card
from x2dfd.files import (
    MAX_DEPTH,
    atomic_write,
    bad_rate,
    check_fields,
    locked_folder,
    parse_json,
    printed_from_c,
    read_json,
    write_bytes,
)
from x2dfd.row_parts import RowParts
from x2dfd.types import Card

DEEP = "[" * 100_000
HOSTILE = {
    "deep": DEEP + "]" * 100_000,
    "deep and cut": DEEP,
    "deep objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "deeper than is read": '{"name": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}",
    "huge number": '{"name": ' + "9" * 5000 + "}",
    "twice": '{"name": "a", "name": "b"}',
    "no JSON": "name: a",
    "not a number": '{"name": NaN, "figures": {"n": -Infinity}}',
}
CARD = Card("a", "1", "here", "MIT", "0" * 64, "none", "no paper", "everything", figures={"n": 3})


@pytest.mark.parametrize("name", HOSTILE)
def test_json_that_troubles_is_one_line(name: str, tmp_path: Path) -> None:
    """Bug prevented: RecursionError or OverflowError, in the parser or in who goes on, ends the run; a card from
    elsewhere ends `x2dfd experts` or loading with a traceback."""
    for text in (HOSTILE[name], b"\xef\xbb\xbf" + HOSTILE[name].encode()):
        with pytest.raises(ValueError) as caught:
            parse_json(text)
        said = str(caught.value)
        assert "\n" not in said and len(said) < 200
        assert {"twice": "'name' occurs twice", "huge number": "5000 digits"}.get(name, "") in said
    (tmp_path / "card.json").write_text(HOSTILE[name])
    with raises("expert_card_unreadable") as refused:
        read_card(tmp_path / "card.json")
    assert "\n" not in str(refused.value)
    with raises("not_an_adapter") as refused:
        read_adapter_card(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [*HOSTILE, "list"])
def test_a_damaged_file_of_our_own_is_one_line_with_its_path(name: str, tmp_path: Path) -> None:
    """Bug prevented: a run that was cut off, or a full disk, ends the next run with a traceback."""
    path = tmp_path / "000001.jsonl"
    path.write_text(HOSTILE.get(name, "[]"))
    for read in (read_json, lambda _: list(RowParts(tmp_path))):
        with raises("json_unreadable", path):
            read(path)


def test_honest_json_is_read_as_it_is() -> None:
    """Bug prevented: brackets in a text, or many of them side by side, are taken for depth."""
    value = {"a": "[" * 1000, "b": [[1, 2.5, None, True]] * 500, "c": 2**64, "d": {"e": {}}, "f": "ü"}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("\ufeff{}".encode()) == {}
    with pytest.raises(ValueError):
        parse_json(b"\xff\xfe{\0}\0")


@dataclass
class Shapes:
    name: str
    share: float
    steps: tuple[tuple[float, float], ...] = ()
    layers: int | tuple[int, ...] = 0
    hashes: dict[str, str] = field(default_factory=dict)
    frame: str | None = None


def test_shapes_and_rates_are_checked_at_each_level() -> None:
    """Bug prevented: a list where a number should be is found far away, in the middle of a verdict; false alarms of -3
    are quoted in a report."""
    good: dict[str, Any] = {"name": "a", "share": 1, "steps": [[0, 1.5]], "layers": [1, 2], "hashes": {"x": "y"}}
    check_fields(Shapes, good)
    for change, said in (
        ({"name": 3}, "'name' is not of type str"),
        ({"name": None}, "'name' is not of type str"),
        ({"share": "0.5"}, "'share' is not a finite number"),
        ({"share": True}, "'share' is not a finite number"),
        ({"share": float("nan")}, "'share' is not a finite number"),
        ({"steps": {"0": 1}}, "'steps' is not a list"),
        ({"steps": [[0, 1], [0]]}, r"'steps\[1\]' is not a list of the right length"),
        ({"steps": [[0, "x"]]}, r"'steps\[0\]\[1\]' is not a finite number"),
        ({"layers": [1, 2.5]}, "'layers' holds"),
        ({"layers": False}, "'layers' holds"),
        ({"hashes": ["x"]}, "'hashes' is not an object"),
        ({"hashes": {"x": ["y"]}}, "'hashes.x' is not of type str"),
        ({"frame": 1}, "'frame' holds"),
        ({"more": 1}, "'more', which is not known"),
    ):
        with pytest.raises(ValueError, match=said):
            check_fields(Shapes, good | change)
    with pytest.raises(ValueError, match="no 'share'"):
        check_fields(Shapes, {"name": "a"})
    others: tuple[Any, ...] = ([], "a", None, 1)
    for other in others:
        with pytest.raises(ValueError, match="not an object"):
            check_fields(Shapes, other)
    good = {"a": {"rate": 0, "interval": [0.1, 0.2], "n": 500}, "b": [{"rate": 1.0}, {"interval": None}]}
    assert bad_rate(good, ("rate", "interval")) is None
    wrong: tuple[Any, ...] = (-3, 1.1, "0.5", True, float("nan"), [0.2], [0.1, 0.2], {}, None)
    for bad in wrong:
        assert bad_rate({"b": [good["a"], {"rate": bad}]}, ("rate", "interval")) == "b.1.rate"
    for bad in ([0.3, 0.2], [0.1], [0.1, 0.2, 0.3], [], 0.1, "0.1"):
        assert bad_rate({"interval": bad}, ("rate", "interval")) == "interval"


def test_a_card_of_other_shapes_is_refused(tmp_path: Path) -> None:
    """Bug prevented: `experts` as a list is joined to a mapping when the model is loaded."""
    good = CARD.to_dict()
    path = tmp_path / "card.json"
    path.write_text(json.dumps(good))
    assert read_card(path) == CARD and read_adapter_card(tmp_path).experts == {}
    changes: tuple[dict[str, Any], ...] = (
        {"experts": ["consistency"]}, {"base": "x"}, {"probes": [1, "2"]}, {"text_layers": {}}, {"sha256": 1},
        {"odd": 1},
    )  # fmt: skip
    for change in changes:
        path.write_text(json.dumps(good | change))
        with raises("not_an_adapter", next(iter(change))):
            read_adapter_card(tmp_path)


def test_a_written_file_has_the_users_rights_and_a_link_stays(tmp_path: Path) -> None:
    """Bug prevented: verdicts about people become readable for everybody on the machine, against the user's umask or
    the file's own rights; a link to a table elsewhere becomes a file, and that table stays as it was."""
    new, old, link = (tmp_path / name for name in ("new", "old", "link"))
    old.write_text("old")
    link.symlink_to(old)
    for umask, mode in ((0o077, 0o600), (0o022, 0o644), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            new.unlink(missing_ok=True)
            write_bytes(new, b"new")
        finally:
            os.umask(before)
        assert new.stat().st_mode & 0o777 == mode
    for mode in (0o600, 0o640, 0o444):
        old.chmod(mode)
        write_bytes(link, str(mode).encode())
        assert old.stat().st_mode & 0o777 == mode
        assert link.is_symlink() and old.read_text() == str(mode)
    with atomic_write(old) as temporary:  # as safetensors writes
        temporary.with_name("other").touch(0o600)
        temporary.with_name("other").replace(temporary)
    assert old.stat().st_mode & 0o777 == 0o444
    with pytest.raises(OSError), atomic_write(new) as temporary:
        temporary.write_bytes(b"half")
        raise OSError
    assert new.read_text() == "new" and sorted(tmp_path.iterdir()) == [link, new, old]


def test_a_folder_in_use_is_another_runs(tmp_path: Path) -> None:
    """Bug prevented: two runs into one folder, whose rows and states then come from both."""
    with locked_folder(tmp_path / "run"), raises("folder_locked", tmp_path / "run"), locked_folder(tmp_path / "run"):
        pass
    with locked_folder(tmp_path / "run"), locked_folder(tmp_path / "other"):
        pass


def test_what_c_prints_is_taken_by_its_line_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """Bug prevented: another's line is lost, or, where two threads take it at once, stderr itself."""
    said: list[bytes] = []

    def library(number: int) -> None:
        with printed_from_c(re.compile(rb"ours"), said):
            os.write(2, b"ours\nanother's\n")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(library, range(100)))
    os.write(2, b"after\n")
    assert said == [b"ours\n"] * 100
    assert capfd.readouterr().err == "another's\n" * 100 + "after\n"

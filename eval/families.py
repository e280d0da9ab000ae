"""`python -m eval.families JUNIT.xml`: the table of docs/models.md, from the results of the families' tests.

    pytest tests/test_families.py -m "slow or not slow" --junitxml=build/families.xml
    python -m eval.families build/families.xml

The tests compare with transformers' own model and processor, on checkpoints with random weights. A cell holds a tick if
its test passed, or the missing package if it was skipped.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import typer

from x2dfd.cli import run_command
from x2dfd.errors import X2DFDError

DOCS = Path(__file__).parent.parent / "docs" / "models.md"
COLUMNS = {
    "test_load": "load",
    "test_verdict": "verdict",
    "test_cues": "packed cues",
    "test_rationale": "rationale",
    "test_assess": "assess",
    "test_adapter": "adapter of PEFT",
    "test_one_begin_token": "one begin token",
    "test_training_text": "training text",
    "test_lora": "LoRA, reload",
    "test_qlora": "QLoRA, reload",
    "test_full": "full, reload",
    "test_split": "served split",
    "test_bits": "4 and 8 bits",
    "test_device_map": "parts elsewhere",
    "test_sixteen_bits": "16 bits",
}
BLOCK = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)


def table(junit: Path) -> str:
    """The Markdown table of a run's JUnit file. Raises X2DFDError where a test failed or was not run."""
    cells: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        test, bracket, family = str(case.get("name")).rstrip("]").partition("[")
        if test not in COLUMNS or not bracket:
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            raise X2DFDError(f"{family}: {test} failed; a table is made of a run that passed", code="test_failed")
        skipped = case.find("skipped")
        needs = re.search(r"pip install (.+?)$", skipped.get("message") or "") if skipped is not None else None
        cells.setdefault(family, {})[test] = "✓" if skipped is None else f"needs {needs[1]}" if needs else "not run"
    if not cells or any(row.keys() != COLUMNS.keys() for row in cells.values()):
        raise X2DFDError(f"{junit} does not hold a whole run of tests/test_families.py", code="run_incomplete")
    lines = [["family", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    lines += [[family, *(row[test] for test in COLUMNS)] for family, row in cells.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(junit: Annotated[Path, typer.Argument(help="what pytest --junitxml wrote of tests/test_families.py")]) -> None:
    """Write the table of docs/models.md."""
    markdown = table(junit)
    text, count = BLOCK.subn(lambda block: f"{block[1]}{markdown}{block[2]}", DOCS.read_text(encoding="utf-8"))
    if count != 1:
        raise X2DFDError(f"{DOCS} has no one place for the table", code="table_place_missing")
    DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main, "Example:\n\n  python -m eval.families build/families.xml")

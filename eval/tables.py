"""Writes the tables of README.md from the result files, so that no number there is typed by hand.

python eval/tables.py           # rewrite the tables
python eval/tables.py --check   # exit 1 when a table differs from the results
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]

_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def detect(results: dict[str, Result]) -> str:
    """Scorers by overall AUC, AUC per method and per source, and false alarms; one block a result file."""
    blocks = []
    for name, result in results.items():
        if result["task"]["name"] != "detect":
            continue
        scorers: dict[str, Result] = result["scorers"]
        parts = sorted({(c, v) for s in scorers.values() for c, table in s["by"].items() for v in table})
        # A set of one generator's fakes bears its name as source and as method: one column says it.
        parts = [part for part in parts if part[0] != "source" or ("method", part[1]) not in parts]
        parts.sort(key=lambda part: part[0] != "method")
        compared = [{(c, v): s["by"][c][v] for c, v in parts if v in s["by"].get(c, {})} for s in scorers.values()]
        pooled = {part for slices in compared for part, x in slices.items() if x["against"] != "own reals"}
        head = ["scorer", "AUC, all [95 %]", "false alarms [95 %]"]
        head += [f"{c} {v}{'*' if (c, v) in pooled else ''}" for c, v in parts] + ["n"]
        lines = [head, ["---"] * len(head)]
        for (scorer, s), slices in zip(scorers.items(), compared, strict=True):
            alarms = _number(s["answers"]["false_alarms"], percent=True) if "answers" in s else "–"
            aucs = [_number(slices[part]["auc"], interval=False) if part in slices else "–" for part in parts]
            lines.append([scorer, _number(s["overall"]["auc"]), alarms, *aucs, str(s["overall"]["n"])])
        data, failed = result["data"], sum(result["failures"].values())
        caption = (
            f"`{name}`: model `{result['model']['name']}`, manifest `{data['sha256'][:12]}`, "
            f"split {data['split'] or 'all'}, {data['n_real']} real and {data['n_fake']} fake, "
            f"{data['n_groups']} groups, {failed} not readable. "
            "False alarms: reals called fake at the shipped threshold."
        )
        if pooled:
            caption += " * against all reals (or all fakes), as there are too few of the same source."
        blocks.append(caption + "\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines))
    return "\n\n".join(blocks) or "No results yet."


def _number(measured: Result, *, percent: bool = False, interval: bool = True) -> str:
    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    if measured["value"] is None:
        return "–"
    bounds = f" [{', '.join(map(show, measured['interval']))}]" if interval and measured["interval"] else ""
    return show(measured["value"]) + bounds


TABLES: dict[str, Callable[[dict[str, Result]], str]] = {"detect": detect}


def filled(text: str, results: dict[str, Result]) -> str:
    """The text with every block between `<!-- table:NAME -->` and `<!-- /table -->` made anew.

    Raises ValueError on an unknown name and on a marker without its end.
    """

    def block(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise ValueError(f"unknown table {match['name']!r} (known: {', '.join(TABLES)})")
        return f"{match[1]}{TABLES[match['name']](results)}\n{match[3]}"

    new, n = _BLOCK.subn(block, text)
    if n != text.count("<!-- table:"):
        raise ValueError("a table marker is not closed by <!-- /table -->, or does not stand on a line of its own")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the README's tables from result files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a table differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "eval" / "results", help="folder of result files")
    args = parser.parse_args(argv)
    try:
        results = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(args.results.glob("*.json"))}
        old = args.readme.read_text("utf-8")
        new = filled(old, results)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if args.check:
        print(f"{args.readme.name}: tables differ from the results; run `make tables`", file=sys.stderr)
        return 1
    temporary = args.readme.with_name(f".{args.readme.name}.new")
    temporary.write_text(new, "utf-8")
    os.replace(temporary, args.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the tables of README.md and eval/RESULTS.md from the result files, so that no number there is typed by hand.

python eval/tables.py           # rewrite the tables
python eval/tables.py --check   # exit 1 when a table differs from the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from x2dfd.files import write_text

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]

_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def detect(results: dict[str, Result], *, all_methods: bool = False) -> str:
    """Scorers in columns; AUC over all, then per method and per source; false alarms last. One block a result file.

    Of the methods only those that were held out and those without reals of their own, unless `all_methods`.
    """
    blocks = []
    for name, result in results.items():
        if result["task"]["name"] != "detect":
            continue
        scorers: dict[str, Result] = result["scorers"]
        parts = sorted({(c, v) for s in scorers.values() for c, table in s["by"].items() for v in table})
        # A set of one generator's fakes bears its name as source and as method: one row says it.
        parts = [part for part in parts if part[0] != "source" or ("method", part[1]) not in parts]
        held_out = result["model"]["stated"].get("held_out", [])
        if not all_methods:
            made = next(iter(scorers.values()))["by"].get("method", {})
            parts = [(c, v) for c, v in parts if c != "method" or v in held_out or made[v]["against"] != "own reals"]
        lines = [["AUC", *scorers, "fake / real"], ["---"] * (len(scorers) + 2)]
        first = next(iter(scorers.values()))
        counts = "{n_fake} / {n_real}".format_map(first["overall"])
        lines.append(["**all**", *[_number(s["overall"]["auc"]) for s in scorers.values()], counts])
        pooled = False
        for column, value in parts:
            slices = [s["by"].get(column, {}).get(value) for s in scorers.values()]
            known = next(x for x in slices if x)
            if known["auc"]["value"] is None:
                continue
            apart = known["against"] != "own reals"
            pooled = pooled or apart
            cells = [_number(x["auc"]) if x else "–" for x in slices]
            marks = ("*" if apart else "") + ("†" if value in held_out else "")
            lines.append([f"{column} {value}{marks}", *cells, "{n_fake} / {n_real}".format_map(known)])
        alarms = [
            _number(s["answers"]["false_alarms"], percent=True) if "answers" in s else "–" for s in scorers.values()
        ]
        lines.append(["false alarms", *alarms, str(result["data"]["n_real"])])
        data, failed = result["data"], sum(result["failures"].values())
        caption = (
            f"`{name}`: model `{result['model']['name']}`, manifest `{data['sha256'][:12]}`, "
            f"split {data['split'] or 'all'}, {data['n_real']} real and {data['n_fake']} fake, "
            f"{data['n_groups']} groups, {failed} not readable. "
            "False alarms: reals called fake at the shipped threshold."
            + (" † left out of the MLLM's training and the calibration (experts: see their cards)." if held_out else "")
        )
        if pooled:
            caption += " * against all reals (or all fakes), as there are too few of the same source."
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


def describe(results: dict[str, Result], *, all_methods: bool = False) -> str:
    """Cues and areas named in rationales against the truth, beside the majority baseline; by method if asked."""
    blocks = []
    for name, result in results.items():
        if result["task"]["name"] != "describe":
            continue
        lines = [["", "area F1 [95 %]", "cue F1 [95 %]", "distinct texts", "contradictions", "n fake"], ["---"] * 6]
        held_out = result["model"]["stated"].get("held_out", [])
        for scorer, s in result["scorers"].items():
            distinct, against = s.get("distinct_texts"), s.get("contradictions")
            share = "–" if distinct is None else f"{100 * distinct:.0f} %"
            wrong = "–" if against is None else f"{100 * against:.1f} %"
            f1 = [_number(s[what]["micro_f1"]) for what in ("areas", "cues")]
            lines.append([scorer, *f1, share, wrong, str(s["n_fake"])])
            for method, part in s.get("by_method", {}).items() if all_methods else ():
                cells = [_number(part[what]) for what in ("areas", "cues")]
                mark = "†" if method in held_out else ""
                lines.append([f"{scorer}, {method}{mark}", *cells, "–", "–", str(part["n"])])
        data = result["data"]
        caption = (
            f"`{name}`: manifest `{data['sha256'][:12]}`, split {data['split'] or 'all'}; forgeries with known cues."
            + (" † left out of the MLLM's training." if held_out and all_methods else "")
        )
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


def speed(results: dict[str, Result], *, all_cases: bool = False) -> str:
    """Seconds of a warm call on one face: the verdict, without and with its rationale, or all that was timed."""
    blocks = []
    for name, result in results.items():
        if result["task"]["name"] != "speed":
            continue
        lines = [["warm, one face", "median s", "10–90 %"], ["---"] * 3]
        lines += [
            [case, f"{t['median']:.2f}", f"{t['p10']:.2f}–{t['p90']:.2f}"]
            for case, t in result["seconds"].items()
            if all_cases or case.startswith("verdict")
        ]
        machine = result["machine"]
        caption = f"`{name}`: {result['threads']} threads of {machine['cpu']}, {result['rounds']} rounds, fp32."
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


def unseen(_: dict[str, Result]) -> str:
    """What the card of the expert `clip` says of generators and real sources that were left out of its training."""
    card = json.loads((ROOT / "external_detectors" / "weights" / "clip.card.json").read_text("utf-8"))
    alarms = card["figures"]["false_alarms_of_a_source_left_out"]
    both = card["figures"]["auc_generator_and_source_left_out"]
    generators = sorted({name.split(" / ")[0] for name in both})
    lines = [["real source left out", "n", "false alarms at 5 %", *(f"AUC, {g} left out too" for g in generators)]]
    lines.append(["---"] * len(lines[0]))
    for source, found in alarms.items():
        aucs = [f"{both[f'{g} / {source}']:.3f}" if f"{g} / {source}" in both else "–" for g in generators]
        lines.append([source, str(found["n"]), f"{100 * found['rate']:.1f} %", *aucs])
    caption = (
        f"Expert `clip` {card['version']}: the threshold that 5 % of the other sources' photos reach, on a source that "
        "its training lacked; and the AUC of a generator against that source when neither was seen. 0.5 is chance."
    )
    return caption + "\n\n" + _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(measured: Result, *, percent: bool = False, interval: bool = True) -> str:
    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    if measured["value"] is None:
        return "–"
    bounds = f" [{', '.join(map(show, measured['interval']))}]" if interval and measured["interval"] else ""
    return show(measured["value"]) + bounds


TABLES: dict[str, Callable[[dict[str, Result]], str]] = {
    "detect": detect,
    "detect-all": partial(detect, all_methods=True),
    "describe": describe,
    "describe-all": partial(describe, all_methods=True),
    "unseen": unseen,
    "speed": speed,
    "speed-all": partial(speed, all_cases=True),
}


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
    parser.add_argument("--pages", type=Path, nargs="+", default=[ROOT / "README.md", ROOT / "eval" / "RESULTS.md"])
    parser.add_argument("--results", type=Path, default=ROOT / "eval" / "results", help="folder of result files")
    args = parser.parse_args(argv)
    try:
        results = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(args.results.glob("*.json"))}
        pages = [(page, old := page.read_text("utf-8"), filled(old, results)) for page in args.pages]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differing = [(page, new) for page, old, new in pages if new != old]
    for page, new in differing:
        if args.check:
            print(f"{page.name}: tables differ from the results; run `make tables`", file=sys.stderr)
        else:
            write_text(page, new)
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())

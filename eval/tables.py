"""Writes the tables of README.md and eval/RESULTS.md from the result files, so that no number there is typed by hand.

    python -m eval.tables           # rewrite the tables
    python -m eval.tables --check   # exit 1 when a table differs from the results, or a result must not be quoted

A result must not be quoted when it was made from code that is in no commit, or does not say by SHA-256 which manifest
and weights it is of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eval.stats import TOO_FEW, Measured
from x2dfd.cli import run_command
from x2dfd.errors import X2DFDError
from x2dfd.files import Json, parse_json, write_text

ROOT = Path(__file__).resolve().parent.parent
Result = Json
NOT_MEASURED = "Not measured."
FEW_MARK = "‡"
DATA_TASKS = ("detect", "describe", "experts", "quality", "rotation")
"""Tasks whose results are of labelled pictures."""

_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Cell = str | int | float | Measured | Json | None
"""A text, a number, or a figure, also in the form of a result file."""


@dataclass(frozen=True)
class Table:
    """A table as data: what stands above it, its column heads, its rows. On a page, a caption too."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    @property
    def texts(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [[shown(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """The table, and what its signs mean."""
        lines = [[*self.columns], ["---"] * len(self.columns), *self.texts]
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        few = any(FEW_MARK in cell for cells in lines for cell in cells) and f"{FEW_MARK} {TOO_FEW}" not in self.title
        note = f" {FEW_MARK} {TOO_FEW}." if few else ""
        return f"{self.title}{note}\n\n{text}"


def shown(cell: Cell, *, percent: bool = False) -> str:
    """A cell's text: figures with three digits and their interval, or `FEW_MARK` where groups are too few for one."""
    if isinstance(cell, dict):
        cell = Measured.read(cell)
    if cell is None or (isinstance(cell, Measured) and cell.value is None):
        return "–"
    if isinstance(cell, str | int):
        return str(cell)

    def number(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    if not isinstance(cell, Measured):
        return number(cell)
    value = number(cell.value if cell.value is not None else 0.0)
    if cell.interval:
        return f"{value} [{number(cell.interval[0])}, {number(cell.interval[1])}]"
    return value + (FEW_MARK if cell.note == TOO_FEW else " (no interval)" if cell.note else "")


def percent(part: Json | None) -> str:
    """A rate of a result file."""
    return shown(part, percent=True)


def detect(name: str, result: Result) -> Iterator[Table]:
    """Scorers in columns; AUC over all, then by every column's values, each with its counts; false alarms last."""
    scorers = _apart(result["scorers"])
    held_out = result["model"]["stated"].get("held_out", [])
    first = next(iter(scorers.values()))
    overall = first["overall"]
    rows: list[list[Cell]] = [["**all**", *_aucs(scorers), *_counts(overall["auc"], overall)]]
    for column, value in _parts(first["by"]):
        known = first["by"][column][value]
        marks = ("" if known["against"] == "own reals" else "*") + ("†" if value in held_out else "")
        found = [s["by"].get(column, {}).get(value, {}).get("auc") for s in scorers.values()]
        rows.append([f"{column} {value}{marks}", *found, *_counts(known["auc"], known)])
    answers = first.get("answers")
    title = _title(name, result)
    if answers:
        alarms = answers["false_alarms"]
        blank: list[Cell] = ["–"] * (len(scorers) - 1)
        rows.append(["false alarms", percent(alarms), *blank, f"– / {alarms['n']}", alarms["groups"]])
        title += (
            " False alarms are real pictures called fake at the shipped threshold. "
            f"{percent(answers['coverage'])} of the pictures were answered; the others got no answer. "
            f"Fakes called real: {percent(answers['misses'])}."
        )
    title += " * against all reals (or all fakes), as there are too few of the same source."
    title += " † held out of the training of the MLLM and of the calibration." if held_out else ""
    yield Table(title, ["AUC", *scorers, "fake / real", "groups"], rows)


def describe(name: str, result: Result) -> Iterator[Table]:
    """What rationales name against the truth, beside the baselines, and by method. Of pictures with reference texts and
    without known cues, how near the texts come."""
    scorers: dict[str, Result] = result["scorers"]
    title = _title(name, result)
    if not any("cues" in s for s in scorers.values()):
        keys = {"rouge_l": "ROUGE-L", "bleu_mean": "BLEU, mean"}
        near: list[list[Cell]] = [
            [scorer, *(s["text"].get(k, {}).get("value") for k in keys), s.get("distinct_texts"),
             percent(s.get("contradictions")), s["text"]["n"]]
            for scorer, s in scorers.items()
        ]  # fmt: skip
        title += " No cues are known: each text against all references of its picture"
        questions = result["references"]["annotations"]["questions"]
        title += f", answers to {questions} different questions." if questions else "."
        yield Table(title, ["", *keys.values(), "distinct texts", "contradictions", "n"], near)
        return
    rows: list[list[Cell]] = []
    for scorer, s in scorers.items():
        areas, cues = (s[what]["micro_f1"] for what in ("areas", "cues"))
        said = [s.get("distinct_texts"), percent(s.get("contradictions"))]
        rows.append([scorer, areas, cues, *said, s["n_fake"], areas["groups"]])
        for method, part in s["by_method"].items():
            counts = [part["n"], part["areas"]["groups"]]
            rows.append([f"{scorer}, {method}", part["areas"], part["cues"], "–", "–", *counts])
    head = ["", "area F1", "cue F1", "distinct texts", "contradictions", "n fake", "groups"]
    yield Table(f"{title} Forgeries with known cues.", head, rows)


def experts(name: str, result: Result) -> Iterator[Table]:
    """Experts, fusion and baselines in columns: all metrics over all, then the AUC of every slice."""
    scorers, held_out = result["scorers"], result["held_out"]
    measures = {"auc": "AUC", "average_precision": "AP", "tpr_at_fpr_0.05": "TPR at 5 % FPR", "eer": "EER"}
    measures["ece"] = "ECE"
    title = (
        f"{_title(name, result)} The largest face of each picture; `fusion` is the verdict"
        f"{'' if 'mllm' in scorers else ' without the MLLM'}. `baseline:sharpness` is the variance of the crop's "
        "Laplacian: the smoother, the likelier fake."
    )
    first = next(iter(scorers.values()))
    counts = _counts(first["overall"]["auc"], first["overall"])
    rows: list[list[Cell]] = [
        [text, *(s["overall"].get(key) for s in scorers.values()), *counts] for key, text in measures.items()
    ]
    yield Table(title, ["all", *scorers, "fake / real", "groups"], rows)
    rows = []
    for column, value in _parts(first["by"]):
        known = first["by"][column][value]
        cells = [shown(s["by"][column][value]["auc"]) + ("†" if value in held_out.get(c, ()) else "")
                 if value in s["by"].get(column, {}) else "–" for c, s in scorers.items()]  # fmt: skip
        mark = "" if known["against"] == "own reals" else "*"
        rows.append([f"{column} {value}{mark}", *cells, *_counts(known["auc"], known)])
    title = (
        "The AUC by slice. † held out of training, as its card says (fusion: of the calibration and of every "
        f"expert that weighs). * against all reals (or all fakes). {FEW_MARK} {TOO_FEW}."
    )
    yield Table(title, ["AUC", *scorers, "fake / real", "groups"], rows)


def robustness(name: str, result: Result) -> Iterator[Table]:
    """AUC of every column under every change; the fusion's false alarms and misses; how far JPEG 95 moves P(fake)."""
    scorers, changes = result["scorers"], result["robustness"]
    if not changes:
        return
    answers = scorers.get("fusion", {}).get("answers", {})
    rates = [key for key in ("false_alarms", "misses") if key in answers]
    rows: list[list[Cell]] = [
        ["unchanged", *_aucs(scorers), *(percent(answers[k]) for k in rates), "–",
         next(iter(scorers.values()))["overall"]["n_groups"]]
    ]  # fmt: skip
    for change, part in changes.items():
        figures = [part["auc"][c] for c in scorers]
        lost = "{fake} / {real}".format_map(part["lost_face"])
        rows.append([change, *figures, *(percent(part[k]) for k in rates), lost, figures[0]["groups"]])
    what = "; ".join(f"{change}: {part['what']}" for change, part in changes.items())
    head = ["AUC", *scorers, *(k.replace("_", " ") for k in rates), "faces lost, fake / real", "groups"]
    yield Table(f"{_title(name, result)} Pictures that keep their face. {what}.", head, rows)
    if swap := result["format_swap"]:
        moved: list[list[Cell]] = [[c, part["median"], part["p90"], part["n"]] for c, part in swap.items()]
        title = "How far P(fake) moves when a PNG becomes a JPEG of quality 95."
        yield Table(title, ["", "median of the change", "90 % stay below", "n"], moved)


def speed(name: str, result: Result) -> Iterator[Table]:
    """Seconds of everything that was set side by side."""
    for device in result["devices"]:
        rows: list[list[Cell]] = []
        for comparison in device["comparisons"]:
            for way, found in comparison["ways"].items():
                times, share, change = (found.get(k) for k in ("times_first", "share_of_bound", "largest_difference"))
                row = [_spread(found["seconds"], ".2f" if found["seconds"]["median"] >= 0.1 else ".4f")]
                row.append(_spread(times, ".1f") if times else "–")
                row.append("–" if share is None else f"{100 * share:.0f} %")
                row.append("–" if change is None else f"{change:.1e}")
                rows.append([f"{comparison['name']}: {way}", *row, comparison["rounds"]])
        title = (
            f"`{name}`: {device['model']} on {device['device']}, {result['threads']} threads of {device['name']}, "
            f"which was measured at {device['matmul_gflop_per_s']:,.0f} GFLOP/s and {device['read_gb_per_s']:.0f} GB/s."
        )
        yield Table(title, ["", "s [10–90 %]", "times the first", "of the bound", "largest change", "rounds"], rows)


def quality(name: str, result: Result) -> Iterator[Table]:
    """Peers that scored the same pictures in turns: seconds, weights, AUC."""
    data, moved = result["data"], result["bf16_against_fp32"]
    rows: list[list[Cell]] = [[way["name"], way["seconds"], way["megabytes"], way["auc"]] for way in result["ways"]]
    title = (
        f"`{name}`: manifest `{data['sha256'][:12]}`, {data['n_real']} real and {data['n_fake']} fake, "
        f"{result['threads']} CPU threads, eight faces at a time. bf16 moves P(fake) by {moved['p_median']:.4f} in the "
        f"median and by {moved['p_90']:.4f} at most for nine faces of ten; its AUC less that of fp32: "
        f"{shown(moved['auc'])}."
    )
    yield Table(title, ["", "s a face", "MB of weights", "AUC"], rows)


def rotation(name: str, result: Result) -> Iterator[Table]:
    """By what was held out of the experts' training its AUC, and the verdicts on their scores."""
    for tower in result["towers"]:
        columns = list(dict.fromkeys(column for part in tower["rows"].values() for column in part.get("auc", {})))
        rows: list[list[Cell]] = []
        for what, part in sorted(tower["rows"].items(), key=lambda item: (item[1]["kind"], item[0])):
            aucs = [part.get("auc", {}).get(column) for column in columns]
            said = [percent(part["answered"]), percent(part["wrong"])]
            rows.append([what, *aucs, *said, part["n"], part["answered"]["groups"]])
        title = (
            f"`{name}`: experts trained without {', '.join(tower['left_out'])}. AUC against the photos of the held-out "
            "sources, and of generators among photos of known sources too; each expert alone; `met`: the shipped "
            "experts, which were trained on all of them. Wrong: photos called fake, fakes called real."
        )
        yield Table(title, ["AUC", *columns, "answered", "wrong", "n", "groups"], rows)


def _spread(part: dict[str, float], form: str) -> str:
    return f"{part['median']:{form}} [{part['p10']:{form}}–{part['p90']:{form}}]"


def _title(name: str, result: Result) -> str:
    data, change = result["data"], result["settings"].get("change")
    return (
        f"`{name}`: model `{result['model']['name']}`, manifest `{data['sha256'][:12]}`, "
        f"split {data['split'] or 'all'}, {data['n_real']} real and {data['n_fake']} fake in {data['n_groups']} "
        f"groups, {sum(result['failures'].values())} not readable"
        f"{f'; every picture changed before it was judged, {change}' if change else ''}. 95 % intervals by groups."
    )


def _parts(by: Result) -> list[tuple[str, str]]:
    """Column and value of the slices, without those that have no AUC."""
    found = sorted((c, v) for c, table in by.items() for v in table if table[v]["auc"]["value"] is not None)
    # A set of one generator's fakes bears its name as source and as method: one row says it.
    return [(c, v) for c, v in found if c != "source" or ("method", v) not in found]


def _apart(scorers: dict[str, Result]) -> dict[str, Result]:
    """Scorers whose figures are all equal as one, under their names: a second column would say nothing more."""
    parts = [(column, value) for column, values in next(iter(scorers.values()))["by"].items() for value in values]
    alike: dict[str, list[str]] = {}
    for name, scorer in scorers.items():
        by = [scorer["by"].get(column, {}).get(value, {}).get("auc") for column, value in parts]
        alike.setdefault(repr([scorer["overall"]["auc"], *by]), []).append(name)
    return {" = ".join(names): scorers[names[0]] for names in alike.values()}


def _aucs(scorers: dict[str, Result]) -> list[Cell]:
    return [s["overall"]["auc"] for s in scorers.values()]


def _counts(figure: Result, part: Result) -> list[Cell]:
    return [f"{part['n_fake']} / {part['n_real']}", figure["groups"]]


def summary(results: dict[str, Result]) -> str:
    """What a reader asks first, in plain words, from the results that bear their task's name."""
    rows: list[list[Cell]] = []
    if found := results.get("detect"):
        scorer = next(iter(found["scorers"].values()))
        answers, overall = scorer["answers"], scorer["overall"]
        rows += [
            ["A fake gets a higher score than a photo (AUC: 1 is perfect, 0.5 is a coin)", overall["auc"],
             f"{overall['n_fake']} fakes, {overall['n_real']} photos"],
            ["Share of the pictures that get an answer", percent(answers["coverage"]), answers["coverage"]["n"]],
            ["Share of these answers that is right", percent(answers["accuracy"]), answers["accuracy"]["n"]],
            ["Share of all photos that is called fake", percent(answers["false_alarms"]), answers["false_alarms"]["n"]],
            ["Share of all fakes that is called real", percent(answers["misses"]), answers["misses"]["n"]],
        ]  # fmt: skip
    if found := results.get("rotation"):
        kinds = {
            "generator among known photos": "AUC on a held-out generator (four, three of them held out twice)",
            "generator": "the same, among photos of sources that were held out too",
            "method on new photos": "AUC on forgeries in photos of a source that was held out",
        }
        for kind, text in kinds.items():
            if part := found["summary"].get(kind):
                rows.append([f"{text}: mean, worst", f"{part['mean_auc']:.2f}, {part['worst_auc']:.2f}", part["n"]])
    if areas := results.get("describe", {}).get("scorers", {}).get("model", {}).get("areas"):
        parts = areas["micro"]
        right = f"{100 * parts['precision']:.0f} %, {100 * parts['recall']:.0f} %"
        rows.append(["Named areas that were changed, changed areas that are named", right, f"{areas['n']} fakes"])
    speed = results.get("speed", {"devices": []})
    for device in speed["devices"]:
        warm = [comparison["ways"] for comparison in device["comparisons"] if comparison["name"].startswith("warm")]
        text = f"Seconds for a verdict, and with the explanation of a fake ({device['device']}, {{}} threads)"
        for ways in warm[:1]:
            spent = ", ".join(_spread(way["seconds"], ".2f") for way in ways.values())
            rows.append([text.format(speed["threads"]), spent, "–"])
    if not rows:
        return NOT_MEASURED
    title = "Brackets hold 95 % intervals; of seconds, the range from the 10th to the 90th percentile."
    return Table(title, ["", "figure", "n"], rows).markdown()


Maker = Callable[[str, Result], Iterator[Table]]

TABLES: dict[str, tuple[str, Maker]] = {
    "detect": ("detect", detect),
    "describe": ("describe", describe),
    "experts": ("experts", experts),
    "robustness": ("experts", robustness),
    "speed": ("speed", speed),
    "quality": ("quality", quality),
    "rotation": ("rotation", rotation),
}
"""Name of a table -> the task whose results it shows, and how. Beside them there is `summary`."""


def table(name: str, results: dict[str, Result]) -> str:
    """The Markdown of a named table, or that nothing was measured."""
    if name == "summary":
        return summary(results)
    task, make = TABLES[name]
    own = {file: r for file, r in results.items() if r["task"]["name"] == task}
    return "\n\n".join(t.markdown() for file, r in own.items() for t in make(file, r)) or NOT_MEASURED


def filled(text: str, results: dict[str, Result]) -> str:
    """The text with every block between `<!-- table:NAME -->` and `<!-- /table -->` made anew. Raises X2DFDError on an
    unknown name and on a marker without its end."""

    def block(match: re.Match[str]) -> str:
        if match["name"] not in (known := ("summary", *TABLES)):
            raise X2DFDError(f"unknown table {match['name']!r} (known: {', '.join(known)})", code="table_unknown")
        return f"{match[1]}{table(match['name'], results)}\n{match[3]}"

    new, n = _BLOCK.subn(block, text)
    if n != text.count("<!-- table:"):
        raise X2DFDError("a table marker has no line <!-- /table -->, or none of its own", code="table_not_closed")
    return new


def faults(name: str, result: Result) -> list[str]:
    """Why a result must not be quoted; none for those that are in no table."""
    task = result["task"]["name"]
    if task not in {own for own, _ in TABLES.values()}:
        return []
    code, hashes = result.get("code"), result.get("hashes", {})
    found = [] if code else ["it does not say from which commit it was made"]
    if code and code["dirty"]:
        found.append("it was made from code with changes that are in no commit")
    if (look := result.get("reporting", {}).get("look", 1)) > 1:
        found.append(f"it is look number {look} of one version at a reporting set")
    wanted = ["manifest"] if task in DATA_TASKS else []
    if result.get("model", {}).get("name") == "embedded":
        wanted += ["calibration"] if task in ("experts", "rotation") else ["base", "adapter", "calibration"]
    found += [f"it holds no SHA-256 of its {part}" for part in wanted if not hashes.get(part)]
    return [f"{name}.json: {fault}" for fault in found]


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit 1 when a table differs")] = False,
    pages: Annotated[list[Path] | None, typer.Option(help="pages to fill; default: README.md, eval/RESULTS.md")] = None,
    results: Annotated[Path, typer.Option(help="folder of result files", show_default="eval/results")] = ROOT
    / "eval"
    / "results",
) -> None:
    """Write the tables of the pages from the result files, or check that they are theirs."""
    try:
        found = {p.stem: parse_json(p.read_bytes()) for p in sorted(results.glob("*.json"))}
        texts = {page: page.read_text("utf-8") for page in pages or [ROOT / "README.md", ROOT / "eval" / "RESULTS.md"]}
    except (OSError, ValueError) as error:
        raise X2DFDError(str(error), code="not_a_result") from error
    wrong = [fault for name, result in found.items() for fault in faults(name, result)]
    for page, old in texts.items():
        new = filled(old, found)
        if new != old and check:
            wrong.append(f"{page.name}: tables differ from the results; run `make tables`")
        elif new != old:
            write_text(page, new)
    for line in wrong:
        typer.echo(line, err=True)
    if wrong and check:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(main, "Example:\n\n  python -m eval.tables --check")

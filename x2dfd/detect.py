"""What `x2dfd detect` does with its options: finds the files, judges them, and writes table, page and case record."""

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
    from x2dfd.html_report import Pictures
    from x2dfd.rows import Rows
    from x2dfd.stores import Place

    Many = Callable[..., Iterator[Report | Failure]]
    Kept = list[tuple[Place, Report | Failure]]

LISTS = (".csv", ".tsv", ".jsonl", ".parquet")  # what a manifest ends in
BATCHES = 16  # at a time: within them the next is decoded while one is judged; bounds the kept rows in memory


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
    part: int = 1  # of `parts` shards
    parts: int = 1
    actors: int | None = None  # of Ray; None: this process
    isolate: bool = False  # decode in a process of its own
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
        if self.parts > 1 and self.report is not None:
            raise typer.BadParameter(
                "each shard would write the same page; make it of the whole", param_hint="--report"
            )
        if self.out is not None:
            if self.out.suffix not in (".parquet", ".jsonl"):
                raise typer.BadParameter(f"{self.out} ends in neither .parquet nor .jsonl", param_hint="--out")
            if self.parts > 1:
                self.out = self.out.with_suffix(f".{self.part}-of-{self.parts}{self.out.suffix}")
        for option, target in (("--report", self.report), ("--out", self.out)):
            if target is not None and (target.is_dir() or not os.access(target.parent, os.W_OK)):
                raise typer.BadParameter(f"{target} cannot be written", param_hint=option)
        from x2dfd.stores import is_pipe

        self.pipes = {path for path in self.paths if is_pipe(path)}
        if self.pipes and self.actors is not None:
            raise typer.BadParameter("actors cannot read this command's pipes", param_hint="--engine")
        if self.isolate and self.actors is not None:
            raise typer.BadParameter("an actor is a process of its own already", param_hint="--isolate")
        own = self.model != ModelSpec() or self.actors is not None or any(v is not None for v in self.loading.values())
        if self.server is not None and own:
            raise typer.BadParameter(
                "a server has a model of its own: give no option of the model's", param_hint="--server"
            )
        # Paths where nothing is: for them alone, no model is loaded.
        self.absent = {p: _absence(p) for p in self.paths if p not in self.pipes and not os.path.lexists(p)}

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
    def written(self) -> list[Path]:
        """Page, print and record."""
        return [target for target in (self.page, self.pdf, self.record) if target is not None]

    def files(self, left_out: Callable[[Path], object] = lambda path: None) -> Iterator[Place]:
        """The files to judge, found anew each time: no more than the names of a folder are held in memory."""
        from x2dfd.manifest import manifest_paths
        from x2dfd.paths import find_media

        chosen: Iterator[Place]
        if self.manifest is not None:
            chosen = manifest_paths(self.manifest, remote=self.remote)
        else:  # what an earlier run wrote into a searched folder is no picture to judge
            found = find_media(self.paths, left_out=left_out)
            chosen = (str(p) if p in self.pipes else p for p in found if not _ours(p, self.written, self.out))
        # By name, not by position: a folder that grew between two starts must not move files from part to part.
        return chosen if self.parts == 1 else (p for p in chosen if self.part_of(p) == self.part)

    def part_of(self, place: Place) -> int:
        """The shard of a file: by its name below the manifest, so that a folder may be mounted elsewhere."""
        name, below = str(place), self.manifest.absolute().parent if self.manifest is not None else None
        if below is not None and isinstance(place, Path) and place.is_relative_to(below):
            name = str(place.relative_to(below))
        return crc32(name.encode("utf-8", "surrogatepass")) % self.parts + 1


def run(asked: Run) -> None:
    """Judge every file, print an answer for each, and write what was asked for. Raises X2DFDError."""
    for missing, failure in asked.absent.items():  # before a model is loaded; as text, it is not said again
        if asked.part_of(missing) != asked.part:
            continue
        if asked.as_json:
            typer.echo(f"{printable(str(missing))}: {failure.reason}", err=True)
        else:
            typer.echo(block(failure))
    if asked.pdf:
        from x2dfd import html_report

        html_report.printer()  # what is missing is said before anything is judged
    links: list[Path] = []
    total = sum(1 for _ in asked.files(links.append))
    if not total:
        typer.echo("no picture or video found", err=True)
    if links:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        typer.echo(f"left out, as links that lead out of their folder: {printable(str(links[0]))}{more}", err=True)
    for given in asked.paths:
        if given.suffix.lower() in LISTS:
            typer.echo(f"{printable(str(given))}: if it is a list of files, say --manifest before its name", err=True)
    many, window, rows = _opened(asked)
    kept: Kept = []
    said: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    stated = 0
    silent = asked.manifest is not None and rows is not None and not asked.as_json
    judging = partial(many, batch_size=asked.batch_size, rationale=asked.rationale, frames=asked.frames)
    try:
        with progress(total, asked.batch_size) as show:
            for path, result, fresh in _judged(judging, asked.files(), rows, asked.frames, window):
                failed = isinstance(result, Failure)
                if isinstance(result, Failure):
                    failures[result.code] += 1
                else:
                    stated += bool(of_generator(result.provenance))
                text = json.dumps(result.to_dict(), allow_nan=False) if asked.as_json else block(result)
                told = failed and not asked.as_json and path in asked.absent
                show("" if silent or told else text, failed, fresh)
                said["failed" if isinstance(result, Failure) else answer.status(result.verdict)] += 1
                if asked.report is not None:
                    kept.append((path, result))
        if rows is not None:
            rows.finish()
            if rows.doubles:
                typer.echo(f"{rows.doubles} paths came more than once; each has one row", err=True)
            typer.echo(f"wrote {printable(str(rows.path))}", err=True)
    finally:
        if rows is not None:
            rows.close()
    _write_case(asked, kept)
    if asked.as_json:
        return
    if said.total() > 1:
        why = f" ({', '.join(f'{n} {code}' for code, n in failures.most_common())})" if failures else ""
        said_so = "1 says that a generator made it" if stated == 1 else f"{stated:,} say that a generator made them"
        marked = f"; {said_so}" if stated else ""
        typer.echo(f"{said.total():,} files: {answer.counted(said.elements())}{why}{marked}", err=True)
    if said["fake"] + said["real"] + said["inconclusive"]:
        typer.echo(answer.NOT_PROOF, err=silent)


def _opened(asked: Run) -> tuple[Many, int, Rows | None]:
    """What judges, how many files it is given at a time, and the table."""
    window = BATCHES * asked.batch_size
    if asked.out is None and asked.absent and all(path in asked.absent for path in asked.paths):
        return partial(_rows_of, asked.absent), window, None
    from x2dfd.rows import Rows
    from x2dfd.stores import detect_places

    if asked.actors is not None:
        from x2dfd.ray_engine import RayDetector

        cluster = RayDetector(asked.model, asked.loading, asked.actors)
        many, facts, window = cluster.detect_many, cluster.info.to_dict(), cluster.window
    elif asked.server is not None:
        from x2dfd.remote import ServerDetector

        server = ServerDetector(asked.server)
        many, facts = partial(detect_places, server), server.facts
    else:
        detector = load_quickly(asked.model, **asked.loading)
        many, facts = partial(detect_places, detector), detector.info.to_dict()
    return many, window, None if asked.out is None else Rows(asked.out, facts, asked.rationale)


def load_quickly(model: ModelSpec, **options: Unpack[LoadOptions]) -> Detector:
    """As x2dfd.load, without the garbage collector, which finds nothing in what torch and transformers make while they
    are imported, and takes a fifth of the command's time to look for it, half of that at its end."""
    gc.disable()
    try:
        return x2dfd.load(model, **options)
    finally:
        gc.freeze()  # nor is it later
        gc.enable()


def shard(text: str | None) -> tuple[int, int]:
    """The numbers of `I/N`. Raises typer.BadParameter."""
    found = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise typer.BadParameter(f"{text} is not I/N with I from 1 to N", param_hint="--shard")
    return int(found[1]), int(found[2])


def _absence(path: Path) -> Failure:
    """The row of a path where nothing is, for which no model need be loaded."""
    from x2dfd.paths import open_source

    try:
        with open_source(path):
            pass
    except InputError as error:
        return Failure(str(path), None, error.code, error.reason)
    return Failure(str(path), None, "not_found", "it came and went while it was looked for")


def _rows_of(absent: dict[Path, Failure], places: Iterable[Place], **_: object) -> Iterator[Report | Failure]:
    """In the place of Detector.detect_many, where none of the paths exists."""
    return (absent[Path(place)] for place in places)


def _ours(path: Path, written: Sequence[Path], out: Path | None) -> bool:
    """The file is the page, its record or its print, or it belongs to the table or to another shard of it."""
    if any(path.name == target.name and path.resolve() == target.resolve() for target in written):
        return True
    if out is None:
        return False
    stem = re.escape(re.sub(r"\.\d+-of-\d+$", "", out.stem))
    name = re.compile(rf"{stem}(\.\d+-of-\d+)?{re.escape(out.suffix)}(\.work(-journal)?)?")
    return name.fullmatch(path.name) is not None and path.parent.resolve() == out.parent.resolve()


def _judged(
    many: Many, files: Iterable[Place], rows: Rows | None, frames: int, window: int
) -> Iterator[tuple[Place, Report | Failure, bool]]:
    """Results in the order of `files`, and whether each is new: those that `rows` holds are not computed again.

    `window`: files at a time, whose kept rows are held in memory.
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


def _write_case(asked: Run, kept: Kept) -> None:
    """The case report: the page, beside it the record, and the print."""
    if asked.page is None or asked.record is None:
        return
    from x2dfd import case, html_report

    results = [result for _, result in kept]
    html = html_report.render(results, [_pictures(Path(path), result) for path, result in kept])
    for target, text in ((asked.page, html), (asked.record, case.dumps(results))):
        with _writing(target):
            write_bytes(target, text.encode("utf-8"))
    if asked.pdf is not None:
        with _writing(asked.pdf):
            html_report.write_pdf(asked.pdf, html)
    for target in asked.written:
        typer.echo(f"wrote {printable(str(target))}", err=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise X2DFDError(f"cannot write {path}: {error.strerror or error}", code="cannot_write") from error


def _pictures(path: Path, result: Report | Failure) -> Pictures:
    """The pixels that the HTML page shows; None when the file can no longer be read."""
    from x2dfd.html_report import shrunk
    from x2dfd.stores import is_pipe, read_address

    if isinstance(result, Failure):
        return None
    try:
        source = read_address(str(path)) if is_pipe(path) else path
        sha256, pictures = shrunk(source, frames_asked(result.media) or 1, {face.frame for face in result.faces})
    except InputError as error:
        typer.echo(f"{printable(str(path))}: no picture in the page: {error}", err=True)
        return None
    if sha256 != result.sha256:
        typer.echo(f"{printable(str(path))}: no picture in the page: the file changed meanwhile", err=True)
        return None
    return pictures

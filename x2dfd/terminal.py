"""The command line's output for people: a file's answer as text, and the progress of a run on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

from x2dfd import answer
from x2dfd.progress import LINE_SECONDS
from x2dfd.statements import CAVEAT, LEAD, of_generator
from x2dfd.types import Evidence, FaceReport, Failure, Report

if TYPE_CHECKING:
    from rich.progress import Progress

COLOURS = {"fake": typer.colors.RED, "real": typer.colors.GREEN, "inconclusive": typer.colors.YELLOW}


def block(result: Report | Failure) -> str:
    """A file's answer as text for people."""
    name = printable(result.path or "(bytes)")
    if isinstance(result, Failure):
        return f"{_coloured(answer.WORDS['failed'], None)}  {result.code}  {name}\n" + wrapped(result.reason) + "\n"
    verdict = result.verdict
    chance = f"{answer.estimate(verdict, result.model)} chance of a fake  " if verdict.p_fake is not None else ""
    if chance and result.model.get("mode") == "paper":
        chance = f"{chance.rstrip()} (not calibrated)  "
    decider = result.decider
    face_label = _face_label(decider, result) if decider else ""
    claims = of_generator(result.provenance)
    lines = [name, wrapped(f"{LEAD} {CAVEAT}"), *map(_statement_line, claims)] if claims else []
    lines.append(f"{_coloured(answer.word(verdict), verdict.label)}  {chance}{face_label}{name}")
    meaning = answer.meaning(result)
    lines.append(wrapped(meaning if verdict.label != "inconclusive" else f"why: {meaning}"))
    if len(result.faces) > 1 and decider is not None and decider.frame is None:
        faces = answer.counted(answer.status(face.verdict) for face in result.faces)
        lines.append(wrapped(f"{len(result.faces)} faces: {faces}"))
    lines += map(wrapped, answer.remarks(result))
    face_verdict = decider.verdict if decider is not None else verdict
    if result.rationale and verdict.p_fake is not None:  # else it repeats why nothing was assessed
        if face_verdict.label != verdict.label:  # a clip, whose answer is not that of one face
            lines.append(wrapped(f"of the most suspicious face: {result.rationale}"))
        elif verdict.label == "inconclusive":
            lines.append(wrapped(f"{result.rationale}{answer.leaning(decider) if decider else ''}"))
        else:
            lines.append(wrapped(f"why: {result.rationale}"))
    if result.cues:
        lines.append(wrapped("cues: " + ", ".join(f"{cue.area} · {cue.artifact}" for cue in result.cues)))
    if decider is not None:
        lines += [wrapped(f"contradiction: {text}") for text in decider.contradictions]
    width = max((len(e.expert) for e in result.evidence), default=0)
    evidence = result.evidence if verdict.p_fake is not None else ()
    lines += [_evidence_bar(e, width) + ("  (no weight of its own)" * (e.expert in result.uncounted)) for e in evidence]
    lines += [wrapped(f"warning: {text}") for text in result.warnings]
    lines += [_statement_line(s) for s in result.provenance.get("statements", ()) if s not in claims]
    if decoded := answer.decoding(result):
        lines.append(wrapped(f"decoding: {decoded}"))
    lines.append(wrapped(f"next: {answer.NEXT_BRIEFLY}"))
    return "\n".join(lines) + "\n"


def _statement_line(statement: dict[str, str]) -> str:
    return wrapped(printable(f"stated in the file: {statement['says']} ({statement['where']})"))


def _face_label(face: FaceReport, report: Report) -> str:
    """ "face 1 of 2 (on the left)  ", "" for a single face; with the time in a clip: "face 1 of 2, at 1.4 s  "."""
    beside = sum(other.frame == face.frame for other in report.faces)
    place = answer.place(face, report)
    words = [f"face {answer.number(face, report)} of {beside}" + f" ({place})" * bool(place)] if beside > 1 else []
    words += [] if face.time_s is None else [f"at {face.time_s:.1f} s"]
    return f"{', '.join(words)}  " if words else ""


def _coloured(word: str, label: str | None) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return word
    return typer.style(word, fg=COLOURS.get(label or "", typer.colors.MAGENTA), bold=True)


def _evidence_bar(evidence: Evidence, width: int) -> str:
    full, empty = "█░" if (sys.stdout.encoding or "").lower().startswith("utf") else "#-"
    name, note = printable(evidence.expert), printable(evidence.note or "")
    if evidence.score is None:
        return f"  {name:<{width}}  no score    {note}".rstrip()
    filled = round(10 * evidence.score)
    return f"  {name:<{width}}  {full * filled}{empty * (10 - filled)} {evidence.score:.2f}  {note}".rstrip()


def wrapped(text: str) -> str:
    lines = [printable(line) for line in text.splitlines()]
    return "\n".join(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="  ") for line in lines if line)


def printable(text: str) -> str:
    """Control and direction characters spelled out: a file name must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@contextlib.contextmanager
def progress(total: int, first: int = 1) -> Iterator[Callable[[str, bool, bool], None]]:
    """Rate and time left on stderr: a bar on a terminal, else a line now and then.

    Yields a function to call for each file, with its text for stdout ("" for none), whether it failed, and whether it
    was judged just now: rows of an earlier run do not count for the rate. Nor do the `first` files, whose time includes
    the loading of the model.
    """
    bar = _progress_bar(total) if sys.stderr.isatty() else None  # elsewhere rich need not be imported
    start = last = time.monotonic()
    done = failed = judged = 0

    def status() -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        if not judged:
            return f"{done:,} from an earlier run"
        if judged <= first:
            return f"{failed} failed"
        seconds_left = (total - done) * seconds / (judged - first)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds_left))
        days = int(seconds_left) // 86_400
        return f"{(judged - first) / seconds:.1f}/s, {f'{days} d ' if days else ''}{left} left, {failed} failed"

    def show(text: str, failure: bool, fresh: bool) -> None:
        nonlocal done, failed, judged, last, start
        done, failed, judged = done + 1, failed + failure, judged + fresh
        start = start if judged > first else time.monotonic()
        if text and bar:
            bar.stop()  # clears the bar, so that it does not mix with the text
        if text:
            typer.echo(text)
        if bar:
            bar.update(bar.task_ids[0], advance=1, description=status())
            if text:
                bar.start()
        elif time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            typer.echo(f"{done:,} of {total:,}: {status()}", err=True)

    with bar or contextlib.nullcontext():
        yield show


def _progress_bar(total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    # Redirecting would send the data to stderr with the bar.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
    bar.add_task("", total=total)
    return bar

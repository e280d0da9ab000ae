"""The Gradio demo: upload photos or short videos, see the verdicts and what they rest on, ask about them.

One endpoint is open to programs (docs/app.md). Chat never changes a verdict: answers are text beside the stored report,
and the page repeats that report's verdict.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol

import gradio as gr
from gradio import processing_utils
from starlette.middleware import Middleware

from app.guard import Guard, Quota
from app.pieces import STRIP, THUMB, Case, Progress, card, choices, curve, draw, face_panel, open_case, table
from x2dfd import case as case_record
from x2dfd.answer import in_words
from x2dfd.errors import InputError, X2DFDError
from x2dfd.files import Json
from x2dfd.follow_up import checked, from_report
from x2dfd.html_report import jpeg_uri, render
from x2dfd.media import Frame, Video, load_media
from x2dfd.types import FaceReport, Failure, Report

MAX_FILE = "30mb"
MAX_FILES = 32  # that are judged at once; more are left out, which is said
UPLOADS_MAX = 1 << 30  # bytes of all uploads that lie here together
MAX_QUEUE = 32  # requests that wait; later ones are told that the queue is full
MAX_QUESTION = 500  # characters
MAX_EXPLAINED = 8  # faces of a file that get a text, the most suspicious ones: a clip has one in each of 32 frames
KEEP_S = 3600  # uploads, reports and sessions are deleted after that many seconds
TIMEOUT_S = 120  # for the verdict on one clip
FIRST = "First choose a photo or a video."
SOON = "You can ask about the result when its explanation is written."
NOTHING = "No face was found, so there is nothing to ask about."
SUGGESTIONS = ("Why?", "Which area?", "How sure are you?", "What should I do now?")
# Screen readers tell what changes in a place that was there before, and not what comes with its own `role="status"`.
LIVE = "element.setAttribute('aria-live', 'polite')"
PICK = """element.addEventListener('click', event => {
  const picked = event.target.closest('[data-pick]');
  if (picked) trigger('select', {index: Number(picked.dataset.pick)});
})"""


class DemoDetector(Protocol):
    """What the demo needs of `x2dfd.Detector`."""

    def detect_many(
        self,
        sources: Iterable[str],
        *,
        rationale: bool = True,
        on_progress: Callable[[Frame | FaceReport], None] | None = None,
    ) -> Iterator[Report | Failure]: ...

    def explain(self, report: Report, source: str, *, on_text: Callable[[str], None] | None = None) -> Report: ...

    def chat(self, report: Report, question: str, *, source: str | None = None) -> str: ...


@dataclass(frozen=True)
class Row:
    """A file that was judged, one of several."""

    file: str
    judged: Report | Failure
    model: str  # that judged it


# --- judging ---


def judge(
    detector: DemoDetector,
    file: str,
    *,
    rationale: bool = True,
    on_progress: Callable[[Frame | FaceReport], None] | None = None,
) -> Report | Failure:
    """The report on an uploaded file, under the name the visitor gave it; never raises for the file's content."""
    [judged] = detector.detect_many([file], rationale=rationale, on_progress=on_progress)
    if isinstance(judged, Report):  # the copy here was made when it was uploaded
        media = {key: value for key, value in judged.media.items() if key != "modified"}
        judged = replace(judged, media=media)
    return replace(judged, path=Path(file).name)


class _Stopped(Exception):
    """The visitor wants no more."""


def _in_background(work: Callable[[Callable[[Any], None]], Any]) -> Generator[Any, None, None]:
    """What `work` tells while it runs in a thread, then what it returns. Closing the iterator ends it at its next word.

    It has ended when the iterator is closed: the next request must not share the model with it.
    """
    said: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
    stopped = Event()

    def listen(what: Any) -> None:
        if stopped.is_set():
            raise _Stopped
        said.put((False, what))

    def run() -> None:
        try:
            said.put((True, work(listen)))
        except BaseException as error:  # goes on in the thread that listens
            said.put((True, error))

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        done = False
        while not done:
            done, what = said.get()
            if isinstance(what, BaseException):
                raise what
            yield what
    finally:
        stopped.set()
        thread.join()


def judging(detector: DemoDetector, file: str) -> Generator[Progress | Report | Failure, None, None]:
    """How far the work on a clip is, frame by frame, then the report, without explanations."""
    end = time.monotonic() + TIMEOUT_S
    progress = Progress()

    def work(listen: Callable[[Progress], None]) -> Report | Failure:
        def heard(what: Frame | FaceReport) -> None:
            if time.monotonic() > end:
                raise InputError(
                    "timeout", f"it took longer than {TIMEOUT_S} seconds; a shorter or smaller clip may do"
                )
            if isinstance(what, Frame):
                progress.frame(what.index, what.pixels)
            else:
                progress.face(what)
            listen(progress)

        return judge(detector, file, rationale=False, on_progress=heard)

    return _in_background(work)


def explaining(detector: DemoDetector, report: Report, file: str) -> Generator[str | Report, None, None]:
    """The explanation's text as it grows, then the report that holds it. Closing the iterator ends the writing."""
    some = tuple(sorted(report.faces, key=FaceReport.suspicion, reverse=True)[:MAX_EXPLAINED])
    with closing(_in_background(lambda on: detector.explain(replace(report, faces=some), file, on_text=on))) as said:
        for one in said:
            if isinstance(one, Report):
                written = {face.index: face for face in one.faces}
                one = replace(one, faces=tuple(written.get(face.index, face) for face in report.faces))
            yield one


# --- answering ---


def answer(detector: DemoDetector, case: Case, index: int | None, question: str) -> str:
    """The answer to a follow-up about one face, with the stored verdict under it."""
    report, face = case.report, case.face(index)
    if face is None:
        return f"{from_report(report, None, question)}\n\n{_stands(case, face)}"
    if (known := from_report(report, face, question)) is not None:
        said = known
    elif report.media.get("kind") == "video":
        said = f"About a video, only its report can be quoted: {face.rationale or 'it holds no explanation.'}"
    else:
        said = _from_model(detector, case, face, question)
    return f"{said}\n\n{_stands(case, face)}".replace(" %", "\N{NO-BREAK SPACE}%")


def _from_model(detector: DemoDetector, case: Case, face: FaceReport, question: str) -> str:
    try:
        said = detector.chat(replace(case.report, faces=(face,)), question, source=case.file).strip()
    except InputError as error:
        if error.code == "not_found":
            return "The upload has been deleted by now; please upload the file again to ask about it."
        return f"This cannot be answered: {error.reason}."
    except X2DFDError as error:
        return f"This cannot be answered: {error}."
    return checked(said, face)


def _stands(case: Case, face: FaceReport | None) -> str:
    whole = case.report.verdict
    said = f"Stored verdict, which chat cannot change: {in_words(face.verdict if face else whole)}."
    return said if len(case.report.faces) < 2 else f"{said} Whole file: {in_words(whole)}."


# --- the page ---


class _Parts:
    """The components of the page that its events read or change, laid out when it is made."""

    def __init__(self, examples: Sequence[tuple[str, Path]], models: Sequence[str], sends_to: str) -> None:
        self.case = gr.State(None, time_to_live=KEEP_S)  # Case | None: what is open
        self.turns = gr.State([], time_to_live=KEEP_S)  # the conversation about it
        self.rows = gr.State([], time_to_live=KEEP_S)  # list[Row], where several files were chosen
        # Gradio's own look for what stands in HTML draws buttons and tables of its kind, bold and boxed.
        pickable: Json = {"js_on_load": PICK, "elem_classes": "live", "apply_default_css": False}
        gr.HTML(draw("head", sends_to))
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.models = gr.Dropdown(
                    models, value=models[0], label="Model", filterable=False, visible=len(models) > 1
                )
                self.upload = gr.File(
                    label="Photos or short videos (up to 30 MB each)", height=170, file_count="multiple"
                )
                thumbs = [(text, _thumb(file)) for text, file in examples]
                self.tries = gr.HTML(draw("examples", thumbs), elem_id="tries", **pickable)
                self.table = gr.HTML(elem_id="results", **pickable)
                self.verdict = gr.HTML(js_on_load=LIVE)
                self.curve = gr.HTML(elem_id="over-time", **pickable)
                self.pick = gr.Dropdown(label="Pick the face to look at", filterable=False, visible=False)
                self.live = gr.HTML(elem_classes="live")
                self.stop = gr.Button("Stop", size="sm", visible=False)
                self.panel = gr.HTML()
                with gr.Row(visible=False) as self.downloads:
                    self.as_html = gr.DownloadButton("Download the report (HTML)", size="sm")
                    self.as_json = gr.DownloadButton("Download the record (JSON)", size="sm")
            with gr.Column(scale=2, min_width=320, elem_classes="talk"):
                self.chat = gr.Chatbot(
                    label="Ask about the result", height=400, allow_tags=False, render_markdown=False, buttons=["copy"],
                    feedback_options=None, allow_file_downloads=False, placeholder=FIRST,
                )  # fmt: skip
                with gr.Row():
                    self.asks = [gr.Button(text, size="sm", min_width=150, interactive=False) for text in SUGGESTIONS]
                with gr.Row(elem_classes="ask"):
                    self.question = gr.Textbox(
                        label="Your question", max_length=MAX_QUESTION, scale=4, min_width=180, interactive=False
                    )
                    self.send = gr.Button("Ask", variant="primary", scale=1, min_width=80, interactive=False)

    @property
    def shown(self) -> list[Any]:
        """All that a new file changes."""
        return [
            self.case, self.turns, self.verdict, self.pick, self.panel, self.downloads, self.as_html, self.as_json,
            self.chat, self.question, self.send, *self.asks, self.live, self.stop, self.curve, self.rows, self.table,
        ]  # fmt: skip


def _thumb(file: Path) -> str:
    """A small picture of a photo or a clip."""
    media = load_media(file, max_frames=1)
    return jpeg_uri(media.frames[0].pixels if isinstance(media, Video) else media.pixels, THUMB)


def _picked(event: gr.EventData, count: int) -> int | None:
    """The number of what was clicked, of `count` things; None for whatever else a client sends."""
    index = event._data.get("index") if isinstance(event._data, dict) else None
    return index if type(index) is int and 0 <= index < count else None


Shown = dict[Any, Any]  # components and their new values; what is not in it stays as it is


class _Events:
    """What happens on the page; each method gives what its components then show."""

    def __init__(
        self,
        parts: _Parts,
        folder: str,
        loaded: dict[str, DemoDetector],
        loaders: Mapping[str, Callable[[], DemoDetector]],
        examples: Sequence[Path],
    ) -> None:
        self.parts, self.folder, self.examples = parts, folder, examples
        self._loaded, self._loaders = loaded, loaders

    def model(self, asked: str) -> DemoDetector:
        """Raises X2DFDError when the model cannot be loaded."""
        if asked not in self._loaded:
            self._loaded[asked] = self._loaders[asked]()
        return self._loaded[asked]

    def show(
        self,
        case: Case | None,
        card: str,
        files: Sequence[str | None] = (None, None),
        ready: bool = False,
        first: str = FIRST,
    ) -> Shown:
        """One file, or none; it starts a new conversation. The table of several files stays."""
        p = self.parts
        faces = choices(case.report) if case else []
        decider = case.face(None) if case else None
        ask_now = ready and bool(faces)
        if case is not None:
            first = SOON if not ready else "Ask about this result." if faces else NOTHING
        return {
            p.case: case, p.turns: [], p.verdict: card, p.curve: curve(case, None) if case else "",
            p.pick: gr.Dropdown(choices=faces, value=decider.index if decider else None, visible=len(faces) > 1),
            p.panel: face_panel(case, None) if case else "",
            p.downloads: gr.Row(visible=ready), p.as_html: files[0], p.as_json: files[1],
            p.chat: gr.Chatbot(value=[], placeholder=first),
            p.question: gr.Textbox(value="", interactive=ask_now),
            **{button: gr.Button(interactive=ask_now) for button in (p.send, *p.asks)},
            p.live: "", p.stop: gr.Button(visible=case is not None and case.stage == "writing"),
        }  # fmt: skip

    def nothing(self, first: str = FIRST) -> Shown:
        return self.show(None, "", first=first) | {self.parts.rows: [], self.parts.table: ""}

    def finished(self, done: Case) -> Shown:
        """The same with its reports to download."""
        pixels = open_case(done.report, done.file)[1]
        made = (("html", render([done.report], [pixels])), ("case.json", case_record.dumps([done.report])))
        files = [
            processing_utils.save_bytes_to_cache(data.encode(), f"x2dfd-report.{kind}", self.folder)
            for kind, data in made
        ]
        return self.show(done, card(done.report), files, ready=True)

    def take(self, files: list[str] | None, asked: str) -> Iterator[Shown]:
        """The verdicts, one file after the other; a single file is then opened, several stand in a table."""
        p = self.parts
        if not files:
            yield self.nothing()
            return
        few, rows = files[:MAX_FILES], list[Row]()
        start = self.nothing(first=SOON if len(few) == 1 else "Pick a file of the table, then ask about it.")
        yield start | {p.verdict: draw("waiting", len(few)), p.stop: gr.Button(visible=True)}
        try:
            judge_by = self.model(asked)
            for file in few:
                yield {p.live: draw("progress", Path(file).name if len(few) > 1 else "", None, None)}
                with closing(judging(judge_by, file)) as steps:
                    for step in steps:
                        if isinstance(step, Progress):
                            yield {p.live: self.progress(step, Path(file).name if len(few) > 1 else "")}
                        else:
                            rows.append(Row(file, step, asked))
                if len(few) > 1:
                    yield {p.rows: rows, p.table: _table(rows, len(few))}
        except X2DFDError as error:  # not here, or the server that it runs on is gone
            yield {p.verdict: draw("trouble", str(error)), p.live: "", p.stop: gr.Button(visible=False)}
            return
        if len(rows) == 1:
            yield from self._open(rows[0])
        else:
            left_out = len(files) - len(few)
            yield {p.verdict: draw("pick_one", left_out), p.live: "", p.stop: gr.Button(visible=False)}

    @staticmethod
    def progress(step: Progress, name: str) -> str:
        frames = [(number, uri, step.judged.get(number)) for number, uri in list(step.frames.items())]
        judged = [frame for frame in frames if frame[2] is not None]
        return draw("progress", name, (len(frames), len(judged)), (judged or frames)[-STRIP:])

    def try_example(self, asked: str, event: gr.EventData) -> Iterator[Shown]:
        number = _picked(event, len(self.examples))
        yield from self.take(None if number is None else [str(self.examples[number])], asked)

    def open_row(self, rows: list[Row], event: gr.EventData) -> Iterator[Shown]:
        """The card of one file of the table."""
        number = _picked(event, len(rows))
        if number is None:
            return
        yield {self.parts.table: _table(rows, len(rows), number), self.parts.verdict: draw("waiting", 1)}
        yield from self._open(rows[number])

    def _open(self, row: Row) -> Iterator[Shown]:
        """The verdict at once, then its explanation as it is written."""
        quick = row.judged
        if isinstance(quick, Failure):
            yield self.show(None, card(quick))
            return
        yield {self.parts.verdict: card(quick)}
        try:
            opened = replace(open_case(quick, row.file)[0], model=row.model, stage="writing" if quick.faces else "done")
        except InputError as error:
            yield self._gone(quick, error)
            return
        yield self.show(opened, card(quick))
        if not quick.faces:
            yield self.finished(opened)
            return
        try:
            with closing(explaining(self.model(row.model), quick, row.file)) as texts:
                for said in texts:
                    if isinstance(said, str):
                        yield {self.parts.live: draw("live", said)}
                    else:
                        yield self.finished(replace(opened, report=said, stage="done"))
        except X2DFDError as error:
            if isinstance(error, InputError) and error.code == "not_found":
                yield self._gone(quick, error)
            else:  # the verdict stands without the text
                yield self.finished(replace(opened, stage="stopped", why=str(error)))

    def _gone(self, report: Report, error: InputError) -> Shown:
        """The upload was deleted meanwhile."""
        return self.show(None, card(Failure(report.path, report.sha256, error.code, error.reason)))

    def end(self, now: Case | None) -> Shown:
        """After `Stop`: a verdict stands, without the explanation; so does the table as far as it came."""
        return self.finished(replace(now, stage="stopped")) if now else self.show(None, draw("ended"))

    def look_at(self, now: Case | None, index: int | None) -> Shown:
        """Another face of the open file."""
        if now is None:
            return {self.parts.panel: ""}
        return {self.parts.panel: face_panel(now, index), self.parts.curve: curve(now, index)}

    def tap(self, now: Case | None, event: gr.EventData) -> Shown:
        """The frame at a point of the curve."""
        index = _picked(event, len(now.report.faces) if now else 0)
        return {self.parts.pick: index, **self.look_at(now, index)} if index is not None else {}

    def ask(
        self, text: str, now: Case | None, index: int | None, said: list[dict[str, str]]
    ) -> Iterator[tuple[object, ...]]:
        text = text.strip()[:MAX_QUESTION]
        if now is None or not text:
            yield said, said, ""
            return
        # The chatbot draws even plain text as HTML: an <img> in it would be fetched by the visitor's browser.
        said = [*said, {"role": "user", "content": escape(text)}]
        yield said, said, ""
        said = [*said, {"role": "assistant", "content": escape(answer(self.model(now.model), now, index, text))}]
        yield said, said, ""


def _table(rows: Sequence[Row], total: int, now: int | None = None) -> str:
    return table([(Path(row.file).name, row.judged) for row in rows], total, now)


def build(
    detector: DemoDetector,
    examples: Sequence[tuple[str, Path]] = (),
    *,
    name: str = "embedded",
    others: Mapping[str, Callable[[], DemoDetector]] | None = None,
    sends_to: str = "",
) -> gr.Blocks:
    """The page around a detector; `examples` are files to click, each with its caption.

    `name` is the detector's in the list of models; `others` in that list are loaded when a visitor picks them. The
    endpoint for programs asks `detector`. `sends_to`: the server that gets face crops, which the page has to say.
    """
    others = others or {}
    # One model, one request at a time, whichever button it comes from.
    model: Json = {"concurrency_id": "model", "concurrency_limit": 1}
    private: Json = {"api_visibility": "private"}
    with gr.Blocks(title="Deepfake check (x2dfd)", analytics_enabled=False, delete_cache=(600, KEEP_S)) as page:
        p = _Parts(examples, [name, *others], sends_to)
        events = _Events(p, page.GRADIO_CACHE, {name: detector}, others, [file for _, file in examples])
        # A click while another file is under way is not lost: it comes next. Which row or example was clicked is in the
        # event's own data, which "always_last" would take from the click before.
        inner: Json = {**private, **model, "show_progress_on": p.verdict}
        picked: Json = {**inner, "trigger_mode": "multiple"}
        working = [
            p.upload.upload(events.take, [p.upload, p.models], p.shown, **inner, trigger_mode="always_last"),
            p.tries.select(events.try_example, p.models, p.shown, **picked),
            p.table.select(events.open_row, p.rows, p.shown, **picked),
        ]
        p.tries.select(lambda: None, None, p.upload, queue=False, **private)
        p.upload.clear(events.nothing, None, p.shown, queue=False, **private)
        p.stop.click(events.end, p.case, p.shown, cancels=working, queue=False, **private)
        p.pick.input(events.look_at, [p.case, p.pick], [p.panel, p.curve], **private)
        p.curve.select(events.tap, p.case, [p.pick, p.panel, p.curve], **private)
        for trigger, source in (
            (p.send.click, p.question), (p.question.submit, p.question), *((b.click, b) for b in p.asks)
        ):  # fmt: skip
            trigger(
                events.ask, [source, p.case, p.pick, p.turns], [p.chat, p.turns, p.question], show_progress_on=p.chat,
                **private, **model,
            )  # fmt: skip
        p.chat.clear(lambda: [], None, p.turns, queue=False, **private)

        def judge_file(file: str | None) -> Json:
            if file is None:
                raise gr.Error("No file was sent.", print_exception=False)
            try:
                judged = judge(detector, file)
            except X2DFDError as error:  # the server of the model is gone
                raise gr.Error(str(error), print_exception=False) from error
            return replace(judged, path=None).to_dict()  # clients download whatever has a "path"

        sent, answered = gr.File(visible=False, label="file"), gr.JSON(visible=False)
        gr.Button(visible=False).click(
            judge_file, sent, answered, api_name="judge", **model,
            api_description="Judge one photo or short video; returns the report as `x2dfd detect --json` prints it.",
        )  # fmt: skip
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)
    return page


def launch(
    page: gr.Blocks, host: str, port: int, *, block: bool = True, root_path: str = "", names: Iterable[str] = ()
) -> str:
    """Serve the page; returns its address (with `block`, once it is stopped). Raises OSError if the port is taken.

    `root_path`: the path under which a proxy shows it. `names`: as for `app.guard.Guard`.
    """
    processing_utils.async_ssrf_protected_download = _refuse_address
    uploads = Quota(Path(page.GRADIO_CACHE), UPLOADS_MAX)
    _, address, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=not block, quiet=True, inbrowser=False, share=False,
        show_error=False, max_file_size=MAX_FILE, allowed_paths=[], state_session_capacity=200, ssr_mode=False,
        enable_monitoring=False, mcp_server=False, run_history=False, footer_links=["api"],
        theme=gr.themes.Default(primary_hue="slate", neutral_hue="slate").set(
            body_text_color_subdued="*neutral_600", button_small_text_size="*text_md",
            link_text_color_dark="*neutral_200",
        ),
        css_paths=[Path(__file__).parent / "style.css"], root_path=root_path or None,
        app_kwargs={"middleware": [Middleware(Guard, uploads=uploads, here=host, names=frozenset(names))]},
    )  # fmt: skip
    return str(address)


async def _refuse_address(*_: object, **__: object) -> str:
    """Gradio would fetch an address that a client sends in place of an upload."""
    raise gr.Error("Addresses are not fetched: upload the file itself.", print_exception=False)

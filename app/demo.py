"""The Gradio demo: upload photos or short videos, see the verdicts and their reasons, ask about them.

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

from app.guard import Guard
from app.pieces import STRIP, THUMB, Case, Progress, card, choices, curve, draw, face_panel, open_case, table
from x2dfd import case as case_record
from x2dfd.answer import in_words
from x2dfd.errors import InputError, X2DFDError
from x2dfd.figures import jpeg_uri
from x2dfd.files import Json
from x2dfd.follow_up import checked, from_report
from x2dfd.html_report import render
from x2dfd.media import Frame, Video, load_media
from x2dfd.types import FaceReport, Failure, Report

MAX_FILE = "30mb"
MAX_FILES = 32  # judged at once; the page says how many more were left out
UPLOADS_MAX = 1 << 30  # bytes of all stored uploads together
MAX_QUEUE = 32  # waiting requests; further ones are refused
MAX_QUESTION = 500  # characters
MAX_EXPLAINED = 8  # the most suspicious faces of a file, which get a text: a clip has one in each of 32 frames
KEEP_S = 3600  # seconds after which uploads, reports and sessions are deleted
TIMEOUT_S = 120  # for the verdict on one clip
FIRST = "First choose a photo or a video."
SOON = "You can ask about the result once its explanation is written."
NOTHING = "No face was found, so there is nothing to ask about."
SUGGESTIONS = ("Why?", "Which area?", "How sure are you?", "What should I do now?")
# Screen readers announce changes of an element that existed before, not a new element with `role="status"`.
LIVE = "element.setAttribute('aria-live', 'polite')"
PICK = """element.addEventListener('click', event => {
  const picked = event.target.closest('[data-pick]');
  if (picked) trigger('select', {index: Number(picked.dataset.pick)});
})"""


class DemoDetector(Protocol):
    """The methods of `x2dfd.Detector` that the demo needs."""

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
    """One of several judged files."""

    file: str
    result: Report | Failure
    model: str  # the model that judged it


# --- judging ---


def judge(
    detector: DemoDetector,
    file: str,
    *,
    rationale: bool = True,
    on_progress: Callable[[Frame | FaceReport], None] | None = None,
) -> Report | Failure:
    """The report on an uploaded file, under the name the visitor gave it; never raises for the file's content."""
    [result] = detector.detect_many([file], rationale=rationale, on_progress=on_progress)
    if isinstance(result, Report):  # a copy's time of modification is that of its upload
        media = {key: value for key, value in result.media.items() if key != "modified"}
        result = replace(result, media=media)
    return replace(result, path=Path(file).name)


class _Stopped(Exception):
    """The visitor has stopped the work."""


def _in_background(work: Callable[[Callable[[Any], None]], Any]) -> Generator[Any, None, None]:
    """Run `work` in a thread; yield what it passes to its callback, then its result. Closing the iterator stops `work`
    at its next callback and waits for its end, as the next request must not share the model with it."""
    events: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
    stopped = Event()

    def emit(item: Any) -> None:
        if stopped.is_set():
            raise _Stopped
        events.put((False, item))

    def run() -> None:
        try:
            events.put((True, work(emit)))
        except BaseException as error:  # raised again in the thread that iterates
            events.put((True, error))

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        done = False
        while not done:
            done, item = events.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def judge_stepwise(detector: DemoDetector, file: str) -> Generator[Progress | Report | Failure, None, None]:
    """Judge a file; yield the progress on a clip, frame by frame, then the report, without explanations."""
    deadline = time.monotonic() + TIMEOUT_S
    progress = Progress()

    def work(emit: Callable[[Progress], None]) -> Report | Failure:
        def on_progress(item: Frame | FaceReport) -> None:
            if time.monotonic() > deadline:
                raise InputError(
                    "timeout", f"it took longer than {TIMEOUT_S} seconds; a shorter or smaller clip may do"
                )
            if isinstance(item, Frame):
                progress.frame(item.index, item.pixels)
            else:
                progress.face(item)
            emit(progress)

        return judge(detector, file, rationale=False, on_progress=on_progress)

    return _in_background(work)


def explain_stepwise(detector: DemoDetector, report: Report, file: str) -> Generator[str | Report, None, None]:
    """Explain a report; yield the text as it grows, then the report with it. Closing the iterator ends the writing."""
    worst = sorted(report.faces, key=FaceReport.suspicion, reverse=True)[:MAX_EXPLAINED]
    few = replace(report, faces=tuple(worst))
    with closing(_in_background(lambda emit: detector.explain(few, file, on_text=emit))) as updates:
        for update in updates:
            if isinstance(update, Report):
                written = {face.index: face for face in update.faces}
                update = replace(update, faces=tuple(written.get(face.index, face) for face in report.faces))
            yield update


# --- answering ---


def answer(detector: DemoDetector, case: Case, index: int | None, question: str) -> str:
    """The answer to a follow-up about one face, with the stored verdict under it."""
    report, face = case.report, case.face(index)
    if face is None:
        return f"{from_report(report, None, question)}\n\n{_stored_verdict(case, face)}"
    if (stored := from_report(report, face, question)) is not None:
        text = stored
    elif report.media.get("kind") == "video":
        text = f"About a video, only its report can be quoted: {face.rationale or 'it holds no explanation.'}"
    else:
        text = _model_answer(detector, case, face, question)
    return f"{text}\n\n{_stored_verdict(case, face)}".replace(" %", "\N{NO-BREAK SPACE}%")


def _model_answer(detector: DemoDetector, case: Case, face: FaceReport, question: str) -> str:
    try:
        text = detector.chat(replace(case.report, faces=(face,)), question, source=case.file).strip()
    except InputError as error:
        if error.code == "not_found":
            return "The upload has been deleted by now; please upload the file again to ask about it."
        return f"This cannot be answered: {error.reason}."
    except X2DFDError as error:
        return f"This cannot be answered: {error}."
    return checked(text, face)


def _stored_verdict(case: Case, face: FaceReport | None) -> str:
    whole = case.report.verdict
    sentence = (
        f"Stored verdict, which chat cannot change: {in_words(face.verdict if face else whole, case.report.model)}."
    )
    return sentence if len(case.report.faces) < 2 else f"{sentence} Whole file: {in_words(whole, case.report.model)}."


# --- the page ---


class _Layout:
    """The components of the page that its events read or change, laid out when it is made."""

    def __init__(self, examples: Sequence[tuple[str, Path]], models: Sequence[str], sends_to: str) -> None:
        self.case = gr.State(None, time_to_live=KEEP_S)  # Case | None: the open one
        self.turns = gr.State([], time_to_live=KEEP_S)  # the conversation about it
        self.rows = gr.State([], time_to_live=KEEP_S)  # list[Row], where several files were chosen
        # Gradio's default styles would draw buttons and tables in HTML its own way, bold and boxed.
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
                self.examples = gr.HTML(draw("examples", thumbs), elem_id="tries", **pickable)
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
                    self.suggestions = [gr.Button(t, size="sm", min_width=150, interactive=False) for t in SUGGESTIONS]
                with gr.Row(elem_classes="ask"):
                    self.question = gr.Textbox(
                        label="Your question", max_length=MAX_QUESTION, scale=4, min_width=180, interactive=False
                    )
                    self.send = gr.Button("Ask", variant="primary", scale=1, min_width=80, interactive=False)

    @property
    def outputs(self) -> list[Any]:
        """Every component that a new file changes."""
        return [
            self.case, self.turns, self.verdict, self.pick, self.panel, self.downloads, self.as_html, self.as_json,
            self.chat, self.question, self.send, *self.suggestions, self.live, self.stop, self.curve, self.rows,
            self.table,
        ]  # fmt: skip


def _thumb(file: Path) -> str:
    """A small picture of a photo or a clip."""
    media = load_media(file, max_frames=1)
    return jpeg_uri(media.frames[0].pixels if isinstance(media, Video) else media.pixels, THUMB)


def _clicked(event: gr.EventData, count: int) -> int | None:
    """The index of the clicked item among `count`; None for anything else that a client sends."""
    index = event._data.get("index") if isinstance(event._data, dict) else None
    return index if type(index) is int and 0 <= index < count else None


Updates = dict[Any, Any]  # new values of components; others stay as they are


class _Events:
    """The page's event handlers; each returns the new values of components."""

    def __init__(
        self,
        layout: _Layout,
        folder: str,
        loaded: dict[str, DemoDetector],
        loaders: Mapping[str, Callable[[], DemoDetector]],
        examples: Sequence[Path],
    ) -> None:
        self.layout, self.folder, self.examples = layout, folder, examples
        self._loaded, self._loaders = loaded, loaders

    def model(self, name: str) -> DemoDetector:
        """Raises X2DFDError when the model cannot be loaded."""
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]

    def show(
        self,
        case: Case | None,
        card: str,
        files: Sequence[str | None] = (None, None),
        ready: bool = False,
        first: str = FIRST,
    ) -> Updates:
        """One file, or none; it starts a new conversation. The table of several files stays."""
        p = self.layout
        faces = choices(case.report) if case else []
        decider = case.face(None) if case else None
        can_ask = ready and bool(faces)
        if case is not None:
            first = SOON if not ready else "Ask about this result." if faces else NOTHING
        return {
            p.case: case, p.turns: [], p.verdict: card, p.curve: curve(case, None) if case else "",
            p.pick: gr.Dropdown(choices=faces, value=decider.index if decider else None, visible=len(faces) > 1),
            p.panel: face_panel(case, None) if case else "",
            p.downloads: gr.Row(visible=ready), p.as_html: files[0], p.as_json: files[1],
            p.chat: gr.Chatbot(value=[], placeholder=first),
            p.question: gr.Textbox(value="", interactive=can_ask),
            **{button: gr.Button(interactive=can_ask) for button in (p.send, *p.suggestions)},
            p.live: "", p.stop: gr.Button(visible=case is not None and case.stage == "writing"),
        }  # fmt: skip

    def empty(self, first: str = FIRST) -> Updates:
        return self.show(None, "", first=first) | {self.layout.rows: [], self.layout.table: ""}

    def finished(self, case: Case) -> Updates:
        """A case whose explanation is done, with its reports to download."""
        pixels = open_case(case.report, case.file)[1]
        documents = (("html", render([case.report], [pixels])), ("case.json", case_record.dumps([case.report])))
        files = [
            processing_utils.save_bytes_to_cache(data.encode(), f"x2dfd-report.{kind}", self.folder)
            for kind, data in documents
        ]
        return self.show(case, card(case.report), files, ready=True)

    def judge_files(self, files: list[str] | None, model: str) -> Iterator[Updates]:
        """The verdicts, one file after the other; then a single file is opened, or several are listed in a table."""
        p = self.layout
        if not files:
            yield self.empty()
            return
        accepted, rows = files[:MAX_FILES], list[Row]()
        start = self.empty(first=SOON if len(accepted) == 1 else "Pick a file from the table, then ask about it.")
        yield start | {p.verdict: draw("waiting", len(accepted)), p.stop: gr.Button(visible=True)}
        try:
            detector = self.model(model)
            for file in accepted:
                name = Path(file).name if len(accepted) > 1 else ""
                yield {p.live: draw("progress", name, None, None)}
                with closing(judge_stepwise(detector, file)) as steps:
                    for step in steps:
                        if isinstance(step, Progress):
                            yield {p.live: self.progress(step, name)}
                        else:
                            rows.append(Row(file, step, model))
                if len(accepted) > 1:
                    yield {p.rows: rows, p.table: _table(rows, len(accepted))}
        except X2DFDError as error:  # the model is not here, or its server is gone
            yield {p.verdict: draw("trouble", str(error)), p.live: "", p.stop: gr.Button(visible=False)}
            return
        if len(rows) == 1:
            yield from self._open(rows[0])
        else:
            left_out = len(files) - len(accepted)
            yield {p.verdict: draw("pick_one", left_out), p.live: "", p.stop: gr.Button(visible=False)}

    @staticmethod
    def progress(step: Progress, name: str) -> str:
        frames = [(number, uri, step.worst.get(number)) for number, uri in list(step.frames.items())]
        scored = [frame for frame in frames if frame[2] is not None]
        return draw("progress", name, (len(frames), len(scored)), (scored or frames)[-STRIP:])

    def try_example(self, model: str, event: gr.EventData) -> Iterator[Updates]:
        number = _clicked(event, len(self.examples))
        yield from self.judge_files(None if number is None else [str(self.examples[number])], model)

    def open_row(self, rows: list[Row], event: gr.EventData) -> Iterator[Updates]:
        """The card of one file of the table."""
        if (number := _clicked(event, len(rows))) is not None:
            yield {self.layout.table: _table(rows, len(rows), number), self.layout.verdict: draw("waiting", 1)}
            yield from self._open(rows[number])

    def _open(self, row: Row) -> Iterator[Updates]:
        """The verdict at once, then its explanation while it is being written."""
        report = row.result
        if isinstance(report, Failure):
            yield self.show(None, card(report))
            return
        yield {self.layout.verdict: card(report)}
        try:
            case = replace(open_case(report, row.file)[0], model=row.model, stage="writing" if report.faces else "done")
        except InputError as error:
            yield self._deleted(report, error)
            return
        yield self.show(case, card(report))
        if not report.faces:
            yield self.finished(case)
            return
        try:
            with closing(explain_stepwise(self.model(row.model), report, row.file)) as updates:
                for update in updates:
                    if isinstance(update, str):
                        yield {self.layout.live: draw("live", update)}
                    else:
                        yield self.finished(replace(case, report=update, stage="done"))
        except X2DFDError as error:
            if isinstance(error, InputError) and error.code == "not_found":
                yield self._deleted(report, error)
            else:  # the verdict stands without the text
                yield self.finished(replace(case, stage="stopped", why=str(error)))

    def _deleted(self, report: Report, error: InputError) -> Updates:
        """The card of a file whose upload has been deleted."""
        return self.show(None, card(Failure(report.path, report.sha256, error.code, error.reason)))

    def stop(self, case: Case | None) -> Updates:
        """After `Stop`: the verdict without its explanation; a table keeps the rows it has."""
        return self.finished(replace(case, stage="stopped")) if case else self.show(None, draw("ended"))

    def look_at(self, case: Case | None, index: int | None) -> Updates:
        """Another face of the open file."""
        if case is None:
            return {self.layout.panel: ""}
        return {self.layout.panel: face_panel(case, index), self.layout.curve: curve(case, index)}

    def open_frame(self, case: Case | None, event: gr.EventData) -> Updates:
        """The frame at a point of the curve."""
        index = _clicked(event, len(case.report.faces) if case else 0)
        return {self.layout.pick: index, **self.look_at(case, index)} if index is not None else {}

    def ask(
        self, text: str, case: Case | None, index: int | None, turns: list[dict[str, str]]
    ) -> Iterator[tuple[object, ...]]:
        text = text.strip()[:MAX_QUESTION]
        if case is None or not text:
            yield turns, turns, ""
            return
        # The chatbot draws even plain text as HTML: an <img> in it would be fetched by the visitor's browser.
        turns = [*turns, {"role": "user", "content": escape(text)}]
        yield turns, turns, ""
        turns = [*turns, {"role": "assistant", "content": escape(answer(self.model(case.model), case, index, text))}]
        yield turns, turns, ""


def _table(rows: Sequence[Row], total: int, current: int | None = None) -> str:
    return table([(Path(row.file).name, row.result) for row in rows], total, current)


def build(
    detector: DemoDetector,
    examples: Sequence[tuple[str, Path]] = (),
    *,
    name: str = "embedded",
    others: Mapping[str, Callable[[], DemoDetector]] | None = None,
    sends_to: str = "",
) -> gr.Blocks:
    """The page around a detector; `examples` are files to click, each with its caption.

    `name` is the detector's name in the list of models, and `others` are loaded when a visitor picks them. The endpoint
    for programs always uses `detector`. `sends_to`: the server that gets face crops, which the page names.
    """
    others = others or {}
    # There is one model, so all buttons together may have one request at a time.
    model: Json = {"concurrency_id": "model", "concurrency_limit": 1}
    private: Json = {"api_visibility": "private"}
    with gr.Blocks(title="Deepfake check (x2dfd)", analytics_enabled=False, delete_cache=(600, KEEP_S)) as page:
        p = _Layout(examples, [name, *others], sends_to)
        events = _Events(p, page.GRADIO_CACHE, {name: detector}, others, [file for _, file in examples])
        # "multiple" queues a click that comes while another file is judged. Its event's data names the row or example;
        # "always_last" would take the data of the click before.
        shared: Json = {**private, **model, "show_progress_on": p.verdict}
        clicked: Json = {**shared, "trigger_mode": "multiple"}
        working = [
            p.upload.upload(events.judge_files, [p.upload, p.models], p.outputs, **shared, trigger_mode="always_last"),
            p.examples.select(events.try_example, p.models, p.outputs, **clicked),
            p.table.select(events.open_row, p.rows, p.outputs, **clicked),
        ]
        p.examples.select(lambda: None, None, p.upload, queue=False, **private)
        p.upload.clear(events.empty, None, p.outputs, queue=False, **private)
        p.stop.click(events.stop, p.case, p.outputs, cancels=working, queue=False, **private)
        p.pick.input(events.look_at, [p.case, p.pick], [p.panel, p.curve], **private)
        p.curve.select(events.open_frame, p.case, [p.pick, p.panel, p.curve], **private)
        for trigger, source in (
            (p.send.click, p.question), (p.question.submit, p.question), *((b.click, b) for b in p.suggestions)
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
                result = judge(detector, file)
            except X2DFDError as error:  # the server of the model is gone
                raise gr.Error(str(error), print_exception=False) from error
            return replace(result, path=None).to_dict()  # clients download whatever has a "path"

        file_input, json_output = gr.File(visible=False, label="file"), gr.JSON(visible=False)
        gr.Button(visible=False).click(
            judge_file, file_input, json_output, api_name="judge", **model,
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
    guard: Json = {"uploads": Path(page.GRADIO_CACHE), "quota": UPLOADS_MAX, "address": host, "names": frozenset(names)}
    _, address, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=not block, quiet=True, inbrowser=False, share=False,
        show_error=False, max_file_size=MAX_FILE, allowed_paths=[], state_session_capacity=200, ssr_mode=False,
        enable_monitoring=False, mcp_server=False, run_history=False, footer_links=["api"],
        theme=gr.themes.Default(primary_hue="slate", neutral_hue="slate").set(
            body_text_color_subdued="*neutral_600", button_small_text_size="*text_md",
            link_text_color_dark="*neutral_200",
        ),
        css_paths=[Path(__file__).parent / "style.css"], root_path=root_path or None,
        app_kwargs={"middleware": [Middleware(Guard, **guard)]},
    )  # fmt: skip
    return str(address)


async def _refuse_address(*_: object, **__: object) -> str:
    """Replaces Gradio's download of an address that a client sends in place of an upload."""
    raise gr.Error("Addresses are not fetched: upload the file itself.", print_exception=False)

"""The Gradio demo: upload a photo or a short video, see the verdict and what it rests on, ask about it.

One endpoint is open to programs (docs/app.md). Chat never changes a verdict: answers are text beside the stored report,
and the page repeats that report's verdict.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Literal, Protocol

import gradio as gr
import jinja2
from gradio import processing_utils
from PIL import Image
from starlette.middleware import Middleware

from app.guard import LOOPBACK, Guard, Quota
from x2dfd import case as case_record
from x2dfd.answer import KINDS_SAID, NEXT_STEPS, NOT_PROOF, WORDS, meaning, percent, shown, stance, status, told
from x2dfd.errors import InputError, X2DFDError
from x2dfd.experts import expert_class
from x2dfd.files import Json
from x2dfd.follow_up import checked, from_report
from x2dfd.html_report import COLOURS, PROVENANCE, UNCOUNTED, overlays, render
from x2dfd.media import Video, load_media
from x2dfd.statements import CAVEAT, LEAD, of_generator
from x2dfd.types import FaceReport, Failure, Report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from x2dfd.html_report import Pictures

HERE = Path(__file__).parent
MAX_FILE = "30mb"
UPLOADS_MAX = 1 << 30  # bytes of all uploads that lie here together
MAX_QUEUE = 32  # requests that wait; later ones are told that the queue is full
MAX_QUESTION = 500  # characters
KEEP_S = 3600  # uploads, reports and sessions are deleted after that many seconds
MAX_SIDE = 1200  # of the picture shown, in pixels
FIRST = "First choose a photo or a video."
SOON = "You can ask about the result when its explanation is written."
NOTHING = "No face was found, so there is nothing to ask about."
# Screen readers tell what changes in a place that was there before, and not what comes with its own `role="status"`.
LIVE = "element.setAttribute('aria-live', 'polite')"
SUGGESTIONS = ("Why?", "Which area?", "How sure are you?", "What should I do now?")


class Judge(Protocol):
    """What the demo needs of `x2dfd.Detector`."""

    def detect_many(self, sources: Iterable[str], *, rationale: bool = True) -> Iterator[Report | Failure]: ...

    def explain(self, report: Report, source: str, *, on_text: Callable[[str], None] | None = None) -> Report: ...

    def chat(self, report: Report, question: str, *, source: str | None = None) -> str: ...


@dataclass(frozen=True)
class Case:
    """A judged file, kept for one visitor."""

    report: Report
    file: str  # where the upload lies until it is deleted
    pictures: Mapping[int | None, str]  # frame number (None: a photo) -> data URI of a JPEG
    model: str = ""  # the name, in the page's list, of the model that judged it and answers about it
    stage: Literal["writing", "stopped", "done"] = "done"  # of the explanation
    why: str = ""  # it stopped, where it was not the visitor

    def face(self, index: int | None) -> FaceReport | None:
        """The face of that index; None asks for the one that decided."""
        found = [f for f in self.report.faces if f.index == index]
        return found[0] if found else self.report.decider


# --- judging ---


def judge(detector: Judge, file: str, *, rationale: bool = True) -> Report | Failure:
    """The report on an uploaded file, under the name the visitor gave it; never raises for the file's content."""
    [judged] = detector.detect_many([file], rationale=rationale)
    if isinstance(judged, Report):  # the copy here was made when it was uploaded
        media = {key: value for key, value in judged.media.items() if key != "modified"}
        judged = replace(judged, media=media)
    return replace(judged, path=Path(file).name)


class _Stopped(Exception):
    """The visitor wants no more text."""


def explaining(detector: Judge, report: Report, file: str) -> Iterator[str | Report]:
    """The explanation's text as it grows, then the report that holds it. Closing the iterator ends the writing."""
    told: SimpleQueue[str | Report | BaseException] = SimpleQueue()
    stopped = Event()

    def listen(text: str) -> None:
        if stopped.is_set():
            raise _Stopped
        told.put(text)

    def work() -> None:
        try:
            told.put(detector.explain(report, file, on_text=listen))
        except BaseException as error:  # goes on in the thread that listens
            told.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while isinstance(said := told.get(), str):
            yield said
        if isinstance(said, BaseException):
            raise said
        yield said
    finally:
        stopped.set()
        thread.join()  # a token at most: the next request must not share the model with this one


def open_case(report: Report, file: str) -> tuple[Case, Pictures]:
    """The case, and its pixels as `html_report.render` takes them."""
    from x2dfd.detector import VIDEO_FRAMES

    media = load_media(file, max_frames=VIDEO_FRAMES)
    if isinstance(media, Video):
        frames = {frame.index: frame.pixels for frame in media.frames}
        return Case(report, file, {number: _jpeg_uri(pixels) for number, pixels in frames.items()}), frames
    return Case(report, file, {None: _jpeg_uri(media.pixels)}), media.pixels


def _jpeg_uri(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# --- answering ---


def answer(detector: Judge, case: Case, index: int | None, question: str) -> str:
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


def _from_model(detector: Judge, case: Case, face: FaceReport, question: str) -> str:
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
    said = f"Stored verdict, which chat cannot change: {told(face.verdict if face else whole)}."
    return said if len(case.report.faces) < 2 else f"{said} Whole file: {told(whole)}."


# --- drawing ---


@cache
def _blind_spot(expert: str) -> str:
    try:
        return expert_class(expert).card.blind_spot
    except X2DFDError:  # a report may name an expert that is not installed here
        return ""


def card(judged: Report | Failure) -> str:
    """The verdict card as HTML."""
    if isinstance(judged, Failure):
        return _draw("problem", judged)
    kind = status(judged.verdict)
    return _draw("card", judged, kind, meaning(judged.verdict, len(judged.faces)))


def face_panel(case: Case, index: int | None) -> str:
    """The picture with all its boxes, and what is said of one face, as HTML."""
    report, face = case.report, case.face(index)
    frame = face.frame if face else next(iter(case.pictures))
    width, height = (float(report.media[side]) for side in ("width", "height"))
    named = list(dict.fromkeys(c.area for c in face.cues if face.areas.get(c.area))) if face else []
    marks = {area: (chr(ord("A") + i), COLOURS[i % len(COLOURS)]) for i, area in enumerate(named)}
    figure = {
        "uri": case.pictures.get(frame),
        "size": (width, height),
        "text": max(width, height) * 0.034,
        "others": [f for f in report.faces if f.frame == frame and f is not face],
        "maps": overlays(face) if face else [],
    }
    return _draw("panel", report, face, figure, marks, case.stage, case.why)


def choices(report: Report) -> list[tuple[str, int]]:
    """The faces as a visitor reads them, and their index."""
    when = ["" if f.time_s is None else f" at {f.time_s:.1f} s" for f in report.faces]
    return [(f"Face {f.index + 1}{at}: {told(f.verdict)}", f.index) for f, at in zip(report.faces, when, strict=True)]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
    )
    environment.filters |= {"percent": percent, "kind": status, "blind_spot": _blind_spot}
    environment.globals |= {
        "WORDS": WORDS,
        "KINDS": KINDS_SAID,
        "STEPS": NEXT_STEPS,
        "stance": stance,
        "NOT_PROOF": NOT_PROOF,
        "PROVENANCE": PROVENANCE,
        "UNCOUNTED": UNCOUNTED,
        "LEAD": LEAD,
        "CAVEAT": CAVEAT,
        "of_generator": of_generator,
    }
    return environment.from_string((HERE / "page.jinja").read_text("utf-8"))


def _draw(macro: str, *values: object) -> str:
    return str(getattr(_template().module, macro)(*values))


# --- the page ---


class Models:
    """The page's list of models, each loaded when it is first asked for."""

    def __init__(self, name: str, detector: Judge, others: Mapping[str, Callable[[], Judge]]) -> None:
        self.names = [name, *others]
        self._loaded, self._loaders = {name: detector}, others

    def __getitem__(self, asked: str) -> Judge:
        """Raises X2DFDError when the model cannot be loaded."""
        if asked not in self._loaded:
            self._loaded[asked] = self._loaders[asked]()
        return self._loaded[asked]


class Widgets:
    """What stands on the page. Made inside of `gr.Blocks`."""

    def __init__(self, names: Sequence[str], examples: Sequence[tuple[str, Path]], sends_to: str) -> None:
        self.case = gr.State(None, time_to_live=KEEP_S)
        self.turns = gr.State([], time_to_live=KEEP_S)
        gr.HTML(_draw("head", sends_to))
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._left(names, examples)
            with gr.Column(scale=2, min_width=320, elem_classes="talk"):
                self._right()

    def _left(self, names: Sequence[str], examples: Sequence[tuple[str, Path]]) -> None:
        """The file, the verdict and what it rests on."""
        self.models = gr.Dropdown(list(names), value=names[0], label="Model", filterable=False, visible=len(names) > 1)
        self.upload = gr.File(label="A photo or a short video (up to 30 MB)", height=170)
        self.tries: list[gr.Button] = []
        if examples:
            with gr.Row():
                self.tries = [gr.Button(caption, size="sm", icon=str(file)) for caption, file in examples]
        self.verdict = gr.HTML(js_on_load=LIVE)
        with gr.Row(visible=False) as self.downloads:
            self.as_html = gr.DownloadButton("Download the report (HTML)", size="sm")
            self.as_json = gr.DownloadButton("Download the record (JSON)", size="sm")
        self.pick = gr.Dropdown(label="Several faces: pick the one to look at", filterable=False, visible=False)
        self.live = gr.HTML(elem_classes="live")
        self.stop = gr.Button("Stop writing", size="sm", visible=False)
        self.panel = gr.HTML()

    def _right(self) -> None:
        """The conversation."""
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
    def shown(self) -> list[gr.components.Component | gr.Row]:
        """What a judged file changes, in the order of `Acts.show`."""
        return [
            self.case, self.turns, self.verdict, self.pick, self.panel, self.downloads, self.as_html, self.as_json,
            self.chat, self.question, self.send, *self.asks, self.live, self.stop,
        ]  # fmt: skip


@dataclass(frozen=True)
class Acts:
    """What the page does. Each returns the new values of widgets."""

    models: Models
    cache: str  # where Gradio keeps files to download

    def show(
        self,
        new: Case | None,
        told: str,
        files: Sequence[str | None] = (None, None),
        ready: bool = False,
        first: str = FIRST,
    ) -> tuple[object, ...]:
        """The values of `Widgets.shown`; any new file starts a new conversation."""
        faces = choices(new.report) if new else []
        decider = new.face(None) if new else None
        ask_now = ready and bool(faces)
        if new is not None:
            first = SOON if not ready else "Ask about this result." if faces else NOTHING
        return (
            new, [], told,
            gr.Dropdown(choices=faces, value=decider.index if decider else None, visible=len(faces) > 1),
            face_panel(new, None) if new else "",
            gr.Row(visible=ready), *files,
            gr.Chatbot(value=[], placeholder=first),
            gr.Textbox(value="", interactive=ask_now),
            *(gr.Button(interactive=ask_now) for _ in range(1 + len(SUGGESTIONS))),
            "", gr.Button(visible=new is not None and new.stage == "writing"),
        )  # fmt: skip

    def finished(self, done: Case) -> tuple[object, ...]:
        """The same with its reports to download."""
        pixels = open_case(done.report, done.file)[1]
        files = [
            processing_utils.save_bytes_to_cache(data.encode(), f"x2dfd-report.{kind}", self.cache)
            for kind, data in (
                ("html", render([done.report], [pixels])), ("case.json", case_record.dumps([done.report]))
            )
        ]  # fmt: skip
        return self.show(done, card(done.report), files, ready=True)

    def take(self, file: str, asked: str) -> Iterator[tuple[object, ...]]:
        """The verdict at once, then its explanation as it is written."""
        yield (waiting := self.show(None, _draw("waiting"), first=SOON))
        try:
            judging = self.models[asked]
            quick = judge(judging, file, rationale=False)
        except X2DFDError as error:  # not here, or the server that it runs on is gone
            yield self.show(None, _draw("trouble", str(error)))
            return
        if isinstance(quick, Failure):
            yield self.show(None, card(quick))
            return
        opened = replace(open_case(quick, file)[0], model=asked, stage="writing" if quick.faces else "done")
        yield self.show(opened, card(quick))
        try:
            for said in explaining(judging, quick, file) if quick.faces else (quick,):
                if isinstance(said, str):
                    yield (*[gr.skip()] * (len(waiting) - 2), _draw("live", said), gr.skip())
                else:
                    yield self.finished(replace(opened, report=said, stage="done"))
        except X2DFDError as error:
            if isinstance(error, InputError) and error.code == "not_found":  # deleted meanwhile
                yield self.show(None, card(Failure(quick.path, quick.sha256, error.code, error.reason)))
            else:  # the verdict stands without the text
                yield self.finished(replace(opened, stage="stopped", why=str(error)))

    def end(self, now: Case | None) -> tuple[object, ...]:
        """After `Stop`: the verdict stands, without the explanation."""
        return self.finished(replace(now, stage="stopped")) if now else self.show(None, "")

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
        said = [*said, {"role": "assistant", "content": escape(answer(self.models[now.model], now, index, text))}]
        yield said, said, ""

    def judge_file(self, file: str | None) -> Json:
        """The endpoint for programs; it asks the first model of the list."""
        if file is None:
            raise gr.Error("No file was sent.", print_exception=False)
        try:
            judged = judge(self.models[self.models.names[0]], file)
        except X2DFDError as error:  # the server of the model is gone
            raise gr.Error(str(error), print_exception=False) from error
        return replace(judged, path=None).to_dict()  # clients download whatever has a "path"


def build(
    detector: Judge,
    examples: Sequence[tuple[str, Path]] = (),
    *,
    name: str = "embedded",
    others: Mapping[str, Callable[[], Judge]] | None = None,
    sends_to: str = "",
) -> gr.Blocks:
    """The page around a detector; `examples` are files to click, each with its caption.

    `name` is the detector's in the list of models; `others` in that list are loaded when a visitor picks them. The
    endpoint for programs asks `detector`. `sends_to`: the server that gets face crops, which the page has to say.
    """
    models = Models(name, detector, others or {})
    with gr.Blocks(title="Deepfake check (x2dfd)", analytics_enabled=False, delete_cache=(600, KEEP_S)) as page:
        _connect(Widgets(models.names, examples, sends_to), Acts(models, page.GRADIO_CACHE), examples)
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)
    return page


def _connect(on: Widgets, acts: Acts, examples: Sequence[tuple[str, Path]]) -> None:
    """Which act follows on what a visitor does."""
    # One model, one request at a time, whichever button it comes from.
    model: Json = {"concurrency_id": "model", "concurrency_limit": 1}
    inner: Json = {"api_visibility": "private", "show_progress_on": on.verdict}
    quick: Json = {"queue": False, "api_visibility": "private"}
    shown = on.shown
    writing = [on.upload.upload(acts.take, [on.upload, on.models], shown, trigger_mode="always_last", **inner, **model)]
    on.upload.clear(lambda: acts.show(None, ""), None, shown, **quick)
    for button, (_, file) in zip(on.tries, examples, strict=True):
        writing.append(button.click(acts.take, [gr.State(str(file)), on.models], shown, **inner, **model))
        button.click(lambda: None, None, on.upload, **quick)
    on.stop.click(acts.end, on.case, shown, cancels=writing, **quick)
    on.pick.input(
        lambda now, index: face_panel(now, index) if now else "",
        [on.case, on.pick], on.panel, api_visibility="private",
    )  # fmt: skip
    for trigger, source in (
        (on.send.click, on.question), (on.question.submit, on.question), *((b.click, b) for b in on.asks),
    ):  # fmt: skip
        trigger(
            acts.ask, [source, on.case, on.pick, on.turns], [on.chat, on.turns, on.question],
            show_progress_on=on.chat, api_visibility="private", **model,
        )  # fmt: skip
    on.chat.clear(lambda: [], None, on.turns, **quick)
    gr.Button(visible=False).click(
        acts.judge_file, on.upload, gr.JSON(visible=False), api_name="judge", **model,
        api_description="Judge one photo or short video; returns the report as `x2dfd detect --json` prints it.",
    )  # fmt: skip


def launch(
    page: gr.Blocks, host: str, port: int, *, block: bool = True, root_path: str = "", names: Iterable[str] = ()
) -> str:
    """Serve the page; returns its address (with `block`, once it is stopped). Raises OSError if the port is taken.

    `root_path`: the path under which a proxy shows it. `names`: hosts, besides this machine's own, by which browsers
    may call it; others are refused where it listens on this machine alone or where names are given.
    """
    processing_utils.async_ssrf_protected_download = _refuse_address
    allowed = {host, *LOOPBACK, *names} if names or host in LOOPBACK else None
    uploads = Quota(Path(page.GRADIO_CACHE), UPLOADS_MAX)
    _, address, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=not block, quiet=True, inbrowser=False, share=False,
        show_error=False, max_file_size=MAX_FILE, allowed_paths=[], state_session_capacity=200, ssr_mode=False,
        enable_monitoring=False, mcp_server=False, run_history=False, footer_links=["api"],
        theme=gr.themes.Default(primary_hue="slate", neutral_hue="slate").set(body_text_color_subdued="*neutral_600"),
        css_paths=[HERE / "style.css"], root_path=root_path or None,
        app_kwargs={"middleware": [Middleware(Guard, uploads=uploads, hosts=allowed)]},
    )  # fmt: skip
    return str(address)


async def _refuse_address(*_: object, **__: object) -> str:
    """Gradio would fetch an address that a client sends in place of an upload."""
    raise gr.Error("Addresses are not fetched: upload the file itself.", print_exception=False)

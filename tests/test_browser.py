"""The page and the case report in a real browser. Skipped, with the reason, where no Chromium or no playwright is.

With X2DFD_SCREENSHOTS=DIR each step leaves a picture there, and the embedded model is shown too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -c constraints.txt '.[app,browser]'"
)
pytest.importorskip("gradio", reason="gradio is not installed: pip install -c constraints.txt '.[app]'")

from playwright.sync_api import expect, sync_playwright

import app.__main__ as command
import x2dfd
from app import demo
from tests.test_app import ASTRONAUT, NONE, ONE, TWO, UPLOAD, FakeDetector, clip, free_port, jpeg
from x2dfd import html_report
from x2dfd.html_report import BROWSERS, QUIET, render
from x2dfd.types import Evidence, Failure, Verdict

pytestmark = pytest.mark.slow  # a browser, and a page with its server for nearly every test

SHOTS = os.environ.get("X2DFD_SCREENSHOTS")
DESK, PHONE = (1280, 900), (390, 844)
EXPLAINED = "The jaw has a soft edge."

# What reaches over the edge of the window, but for a picture that is enlarged, and text that is cut by its own box.
CUT_OFF = """() => {
  const out = [];
  for (const e of document.querySelectorAll('main *, body > header *, footer *')) {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    const drawn = e.closest('svg, .picture > img');
    if (!e.checkVisibility({visibilityProperty: true}) || !box.width || drawn) continue;
    if (box.right > innerWidth + 1 || box.left < -1) out.push('over the edge: ' + e.outerHTML.slice(0, 120));
    const clips = style.overflowX === 'hidden' || style.overflowX === 'clip' || style.textOverflow === 'ellipsis';
    if (clips && e.matches('button, p, h1, h2, h3, h4, li, td, th, dd, label') && e.scrollWidth > e.clientWidth + 1)
      out.push('cut: ' + e.outerHTML.slice(0, 120));
  }
  return out;
}"""

# Visible texts whose contrast with what lies behind them is under 4.5 (WCAG 2.1 AA).
TOO_PALE = """() => {
  const channels = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const out = [];
  for (const e of document.querySelectorAll('main *, body > header *, footer *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility({visibilityProperty: true}) || e.closest('svg, [disabled], .hide')) continue;
    let behind = e;
    while (behind && (channels(getComputedStyle(behind).backgroundColor)[3] ?? 1) < .99) behind = behind.parentElement;
    const ground = behind ? channels(getComputedStyle(behind).backgroundColor) : [255, 255, 255];
    const [a, b] = [light(channels(getComputedStyle(e).color)), light(ground)].sort((x, y) => y - x);
    const contrast = (a + .05) / (b + .05);
    if (contrast < 4.5) out.push(e.textContent.trim().slice(0, 60) + ': ' + contrast.toFixed(2));
  }
  return out;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is here ({', '.join(BROWSERS)}): apt install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=found, args=[*QUIET, *([] if os.geteuid() else ["--no-sandbox"])]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeDetector, str]]:
    """The app with a stand-in for the detector, and its address."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "twin.jpg").write_bytes(jpeg(ASTRONAUT))
    detector = FakeDetector()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "cache"))
        page = demo.build(detector, [("its forged twin", folder / "twin.jpg")])
        yield detector, demo.launch(page, "127.0.0.1", free_port(), block=False)
        page.close(verbose=False)


Tabs = Callable[..., Any]


@pytest.fixture
def tabs(browser: Any) -> Iterator[Tabs]:
    """Opens addresses as a visitor of that screen does; every other address than this machine's is refused."""
    contexts: list[Any] = []

    def opened(address: str, size: tuple[int, int] = DESK, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        tab = context.new_page()
        tab.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
        tab.goto(address)
        tab.get_by_role("heading", level=1).wait_for()
        return tab

    yield opened
    for context in contexts:
        context.close()


def looks_right(tab: Any, name: str, scheme: str = "light") -> None:
    """Nothing is cut off, every text can be read; the picture of it is kept where asked for."""
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=f"{SHOTS}/{name}-{tab.viewport_size['width']}-{scheme}.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    assert tab.evaluate(CUT_OFF) == []
    assert tab.evaluate(TOO_PALE) == []


def upload(tab: Any, content: bytes, name: str = "photo.jpg") -> None:
    file = {"name": name, "mimeType": "image/jpeg", "buffer": content}
    tab.get_by_test_id("file-upload").set_input_files(file)


def ready(tab: Any) -> None:
    """The explanation is written and can be asked about."""
    expect(tab.get_by_role("button", name="Ask", exact=True)).to_be_enabled(timeout=30_000)


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk", "phone-dark"])
def test_upload_verdict_follow_up_face_and_report(
    size: tuple[int, int], scheme: str, served: tuple[FakeDetector, str], tabs: Tabs, tmp_path: Path
) -> None:
    """Parts that work one by one and not together: what a first visitor does, by what is written on the page."""
    tab = tabs(served[1], size, scheme)
    looks_right(tab, "first", scheme)
    upload(tab, TWO, f"{'a very long name of a holiday photo ' * 4}.jpg")
    card = tab.get_by_role("region", name="Verdict")
    expect(card).to_contain_text("Likely fake", timeout=30_000)
    expect(card).to_contain_text("not proof")
    expect(card).to_contain_text("Of 2 faces, the most suspicious one counts.")
    ready(tab)
    expect(tab.get_by_role("region", name="Face 1")).to_contain_text(EXPLAINED)
    looks_right(tab, "verdict", scheme)
    tab.get_by_label("Your question").fill("What about the eyes?")
    tab.get_by_role("button", name="Ask", exact=True).click()
    expect(tab.get_by_role("log")).to_contain_text("Stored verdict, which chat cannot change", timeout=30_000)
    tab.get_by_label("Pick the face to look at").click()
    tab.get_by_role("option", name="Face 2").click()
    expect(tab.get_by_role("region", name="Face 2")).to_contain_text("This one looks natural.", timeout=30_000)
    looks_right(tab, "second-face", scheme)
    for kind, content in (("report (HTML)", "<!doctype html>"), ("record (JSON)", "x2dfd case record")):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=f"Download the {kind}").click()
        download.value.save_as(tmp_path / "file")
        assert content in (tmp_path / "file").read_text()


def test_the_keyboard_reaches_everything(served: tuple[FakeDetector, str], tabs: Tabs) -> None:
    """Who cannot use a mouse must be able to choose a file, take an example, switch the map, ask and save."""
    tab = tabs(served[1])
    focused = "(e => e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText)(document.activeElement)"

    def press_tab_until(name: str, limit: int = 25) -> None:
        reached = []
        for _ in range(limit):
            tab.keyboard.press("Tab")
            reached.append(" ".join(str(tab.evaluate(focused)).split()))
            if name in reached[-1]:
                return
        raise AssertionError(f"{name!r} cannot be reached; what can: {reached}")

    press_tab_until("Click to upload")
    chosen: list[Any] = []
    tab.on("filechooser", lambda chooser: chosen.append(chooser))
    for _ in range(20):  # a key that is pressed before the page has come to life is lost
        tab.keyboard.press("Enter")
        tab.wait_for_timeout(500)
        if chosen:
            break
    assert chosen
    press_tab_until("its forged twin")
    tab.keyboard.press("Enter")
    ready(tab)
    press_tab_until("Map of where a change")
    overlay = tab.locator(".x2 image.map")
    expect(overlay).to_be_visible()  # it points at something on a face that is called fake
    looks_right(tab, "map")
    tab.keyboard.press("Space")
    expect(overlay).to_be_hidden()
    press_tab_until("Download the report (HTML)")
    with tab.expect_download():
        tab.keyboard.press("Enter")
    press_tab_until("Which area?")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("log")).to_contain_text("Which area?", timeout=30_000)
    press_tab_until("Your question")
    tab.keyboard.type("How sure are you?")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("log")).to_contain_text("The calibrated estimate", timeout=30_000)


def test_a_screen_reader_finds_names_and_hears_the_verdict(served: tuple[FakeDetector, str], tabs: Tabs) -> None:
    """A verdict that appears in silence, a bar without words or a control without a name: a visitor has to guess."""
    tab = tabs(served[1])
    expect(tab.get_by_role("button", name="Click to upload or drop files")).to_be_enabled()
    assert UPLOAD in tab.locator("main").inner_text()
    before = tab.evaluate_handle("document.querySelector('[aria-live=polite]:not([role=log])')")
    upload(tab, TWO)
    ready(tab)
    # The card came into a place that was announced as live before: that is what is read out.
    assert before.evaluate("e => e.isConnected && e.innerText.includes('Likely fake')")
    spoken = "chance of a fake: 93 % on a scale from 0 to 100; no answer is given between 35 % and 72 %"
    expect(tab.get_by_role("region", name="Verdict").get_by_role("img", name=spoken)).to_be_visible()
    expect(tab.get_by_role("img", name="photo.jpg, 2 faces marked")).to_be_visible()
    for role, name in (
        ("checkbox", "Outlines of the named areas"), ("checkbox", "Map of where a change is suspected (by tower)"),
        ("combobox", "Pick the face to look at"), ("textbox", "Your question"),
        ("log", "chatbot conversation"), ("list", "Marked areas"),
        ("heading", "Face 1: Likely fake (93 % chance of a fake)"),
    ):  # fmt: skip
        expect(tab.get_by_role(role, name=name)).to_have_count(1)
    nameless = "e => !(e.innerText.trim() || e.getAttribute('aria-label') || e.title || e.labels?.length || e.alt)"
    controls = "[...document.querySelectorAll('main button, main input, main textarea, main a')]"
    visible = f"{controls}.filter(e => e.checkVisibility())"
    assert tab.evaluate(f"() => {visible}.filter({nameless}).map(e => e.outerHTML.slice(0, 200))") == []
    assert tab.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "dark"), (PHONE, "light")], ids=["desk-dark", "phone"])
def test_several_files_and_a_clip(
    size: tuple[int, int], scheme: str, served: tuple[FakeDetector, str], tabs: Tabs, tmp_path: Path
) -> None:
    """A table that is cut off at a long name, a row that cannot be clicked, a curve nobody can tap."""
    tab = tabs(served[1], size, scheme)
    long = f"{'a-name-without-a-place-to-break' * 3}.jpg"
    contents = {long: ONE, "landscape.jpg": NONE, "letter.jpg": b"text", "clip.mp4": clip(tmp_path / "clip.mp4")}
    files = [{"name": n, "mimeType": "image/jpeg", "buffer": c} for n, c in contents.items()]
    tab.get_by_test_id("file-upload").set_input_files(files)
    table = tab.get_by_role("region", name="Results")
    expect(table).to_contain_text("4 files: 2 likely fake, 1 not assessed, 1 not judged", timeout=60_000)
    expect(tab.get_by_text("Pick a file from the table to see")).to_be_visible(timeout=30_000)
    looks_right(tab, "batch", scheme)
    table.get_by_role("button", name="landscape.jpg").press("Enter")
    expect(tab.get_by_role("region", name="Verdict")).to_contain_text("Not assessed", timeout=30_000)
    table.get_by_text("Likely fake").last.click()  # anywhere in the row
    expect(tab.get_by_role("region", name="At 1.8 s")).to_contain_text(EXPLAINED, timeout=60_000)
    looks_right(tab, "clip", scheme)
    tab.get_by_role("region", name="The clip over time").get_by_role("button", name="0.6 s: 48 %").click()
    expect(tab.get_by_role("region", name="At 0.6 s")).to_be_visible(timeout=30_000)


def test_who_waits_in_the_queue_is_told(served: tuple[FakeDetector, str], tabs: Tabs) -> None:
    """While another visitor's photo is judged, a page that stays as it was looks broken."""
    detector, address = served
    detector.may_go.clear()
    try:
        first, second = tabs(address), tabs(address)
        upload(first, ONE)
        expect(first.get_by_text("Looking for faces")).to_be_visible(timeout=30_000)
        looks_right(first, "judging")
        upload(second, ONE)
        expect(second.get_by_text(re.compile("queue|Looking for faces"))).to_be_visible(timeout=30_000)
        looks_right(second, "queue")
    finally:
        detector.may_go.set()
    ready(second)


def case_report() -> str:
    """On a photo of two faces whose name has no place to break, with all that a report can hold, and a broken file."""
    from tests.test_html_report import VALIDATION, face, report

    ratio = {"value": 9.5, "interval": [4.1, 20.0], "limits": [0.04, 50.0], "run": "detect, abc"}
    evidence = (Evidence("blending", 0.91, "points at jaw", map=((0.0, 1.0), (0.5, 0.0))), *face().evidence)
    second = face(index=1, box=(684.0, 66.0, 106.0, 132.0), verdict=Verdict("inconclusive", 0.5, "in_band"), areas={})
    two = report(
        path="x" * 150 + ".jpg",
        media={"kind": "image", "format": "JPEG", "width": 1024, "height": 512, "bytes": 135500, "exif": {"make": "A"}},
        faces=(face(evidence=evidence, crop=((172.0, 66.0), (278.0, 66.0), (172.0, 198.0))), second),
        evidence=evidence,
        model=report().model | {"validation": VALIDATION},
        likelihood_ratio=ratio | {"propositions": ["H1: forged.", "H2: as taken."]},
        provenance={"state": "invalid", "codes": ["assertion.dataHash.mismatch"], "signer": "A " * 90},
    )
    broken = Failure("letter-" * 30 + ".jpg", None, "not_an_image", "the content is neither a picture nor a video")
    return render([two, broken], [np.hstack([ASTRONAUT, ASTRONAUT]), None])


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "dark"), (PHONE, "light")], ids=["desk-dark", "phone"])
def test_the_case_report_can_be_read_on_every_screen(
    size: tuple[int, int], scheme: str, tabs: Tabs, tmp_path: Path
) -> None:
    """A report that is cut off at a long file name, or grey on black, is what an editor gets to see of all this."""
    (tmp_path / "report.html").write_text(case_report())
    tab = tabs((tmp_path / "report.html").as_uri(), size, scheme)
    looks_right(tab, "report", scheme)
    column, drawn, chip = (tab.locator(s).first.bounding_box() for s in (".figures", ".picture", ".chip"))
    assert drawn["width"] == pytest.approx(column["width"], abs=1)  # scaled to the column
    assert drawn["x"] <= chip["x"] and chip["x"] + chip["width"] <= drawn["x"] + drawn["width"] and chip["height"] > 15
    overlay = tab.locator("image.map")
    expect(overlay).to_be_visible()  # of a face that is called fake, and it points at something
    tab.get_by_role("checkbox", name="Map of where a change").uncheck()
    expect(overlay).to_be_hidden()
    tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    looks_right(tab, "report-open", scheme)


def test_the_case_report_is_printed_whole(browser: Any, tmp_path: Path) -> None:
    """Closed parts of the page must be in the print, which cannot be opened; and Chromium's options must be right."""
    html, folder = case_report(), Path(SHOTS or tmp_path)
    html_report.write_pdf(folder / "report.pdf", html)
    closed = html.replace("details::details-content { content-visibility: visible; block-size: auto; }", "")
    html_report.write_pdf(tmp_path / "closed.pdf", closed)
    whole, part = (path.read_bytes() for path in (folder / "report.pdf", tmp_path / "closed.pdf"))
    assert whole.startswith(b"%PDF") and whole.rstrip().endswith(b"%%EOF")
    pages = [len(re.findall(rb"/Type\s*/Page\b", data)) for data in (part, whole)]
    assert pages[0] < pages[1] and pages[1] >= 3, pages


@pytest.mark.needs_base
@pytest.mark.skipif(not SHOTS, reason="only for pictures, which are kept with X2DFD_SCREENSHOTS=DIR")
def test_the_embedded_model_on_the_page(tabs: Tabs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page as a user has it: an example, its verdict, and a question."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    examples = command.make_examples(tmp_path / "examples")
    page = demo.build(x2dfd.load(), examples)
    try:
        address = demo.launch(page, "127.0.0.1", free_port(), block=False)
        tab = tabs(address)
        said = [*map(re.compile, ("Likely real", "Likely fake", "No answer", "Not assessed", "Likely|No answer"))]
        for (caption, path), word in [*zip(examples, said, strict=True), (examples[1], said[1])]:
            tab.get_by_role("button", name=caption).click()
            expect(tab.get_by_role("region", name="Verdict")).to_be_hidden(timeout=60_000)
            expect(tab.get_by_role("region", name="Verdict")).to_contain_text(word, timeout=240_000)
            expect(tab.get_by_role("button", name="Download the report (HTML)")).to_be_visible(timeout=240_000)
            looks_right(tab, f"embedded-{path.stem}")
        tab.get_by_role("button", name="Which area?").click()
        expect(tab.get_by_role("log")).to_contain_text("Which area?", timeout=240_000)
        tab.get_by_role("button", name="How sure are you?").click()
        expect(tab.get_by_role("log")).to_contain_text("The calibrated estimate", timeout=240_000)
        tab.screenshot(path=f"{SHOTS}/page.png")
        tab.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        looks_right(tab, "embedded-forged")
    finally:
        page.close(verbose=False)

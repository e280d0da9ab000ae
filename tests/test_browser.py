"""The page in a real browser: upload, verdict, follow-up, another face, report. Skipped where no Chromium is found.

With X2DFD_SCREENSHOTS=DIR each step leaves a picture there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -c constraints.txt '.[app,browser]'"
)
pytest.importorskip("gradio", reason="gradio is not installed: pip install -c constraints.txt '.[app]'")

from playwright.sync_api import sync_playwright

from app import demo
from tests.test_app import ONE, TWO, FakeDetector, folder, page, port
from x2dfd.html_report import BROWSERS

__all__ = ["folder", "page", "port"]  # fixtures

SHOTS = os.environ.get("X2DFD_SCREENSHOTS")


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is here ({', '.join(BROWSERS)}): apt install chromium")
    return found


@pytest.fixture
def detector() -> FakeDetector:
    return FakeDetector()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def tab(request: pytest.FixtureRequest, chromium: str, page: Any, port: int) -> Iterator[Any]:
    """The open page; every other address than this machine's is refused."""
    address = demo.launch(page, "127.0.0.1", port, block=False)
    width, height = request.param
    with sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.route("**/*", lambda r: r.continue_() if "//127.0.0.1" in r.request.url else r.abort())
        tab.goto(address)
        yield tab
        browser.close()
    page.close(verbose=False)


def shot(tab: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=f"{SHOTS}/{name}-{tab.viewport_size['width']}.png", full_page=True)


def upload(tab: Any, content: bytes, name: str = "photo.jpg") -> None:
    file = {"name": name, "mimeType": "image/jpeg", "buffer": content}
    tab.locator("input[type=file]").first.set_input_files(file)


def fits(tab: Any) -> bool:
    return bool(tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1"))


def test_upload_verdict_follow_up_face_and_report(tab: Any, tmp_path: Path) -> None:
    """Parts that work one by one and not together: what a first visitor does, by what is written on the page."""
    shot(tab, "first")
    assert fits(tab)
    upload(tab, TWO)
    tab.get_by_text("Likely fake").first.wait_for(timeout=20_000)
    tab.get_by_text("not proof").first.wait_for()
    tab.get_by_text("The jaw has a soft edge.").first.wait_for()
    shot(tab, "verdict")
    assert fits(tab)
    tab.get_by_label("Your question").fill("What about the eyes?")
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_text("Stored verdict, which chat cannot change").wait_for()
    tab.get_by_label("Several faces: pick the one to look at").click()
    tab.get_by_role("option", name="Face 2").click()
    tab.get_by_text("This one looks natural.").first.wait_for()
    shot(tab, "second-face")
    with tab.expect_download() as download:
        tab.get_by_text("Report (JSON)").click()
    download.value.save_as(tmp_path / "record.json")
    assert "x2dfd case record" in (tmp_path / "record.json").read_text()


def test_map_is_hidden_until_it_is_switched_on(tab: Any) -> None:
    """A map that is always on hides the face; a switch without effect shows nothing."""
    upload(tab, ONE)
    tab.get_by_text("The jaw has a soft edge.").first.wait_for(timeout=20_000)
    overlay = tab.locator(".x2 image.map")
    assert not overlay.is_visible()
    tab.locator("input.of-maps").check()
    assert overlay.is_visible()
    shot(tab, "map")


def test_broken_file_is_said_plainly(tab: Any) -> None:
    """A visitor who picks the wrong file must read why."""
    upload(tab, b"this is a letter", "letter.jpg")
    tab.get_by_text("Not judged").wait_for(timeout=20_000)
    shot(tab, "broken")

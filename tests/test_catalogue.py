"""The catalogue shows what the forge did, whole, alike on every run, and in its place."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from data_gen import catalogue as module
from data_gen.__main__ import app
from data_gen.catalogue import IMITATES, STRENGTHS, catalogue
from data_gen.forge import HARMLESS, METHODS, forge
from tests.raising import raises, says

ROOT = Path(__file__).resolve().parents[1]
Array = NDArray[Any]


class _Page(HTMLParser):
    """What a browser would make of the page: its tags, and its cards by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: dict[str, list[dict[str, str | None]]] = {}  # id -> the pictures of the card
        self.words: dict[str, str] = {}  # id -> its text
        self._card = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "article":
            self._card = values["id"] or ""
            self.cards[self._card], self.words[self._card] = [], ""
        if tag == "img" and self._card:
            self.cards[self._card].append(values)

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._card = ""

    def handle_data(self, data: str) -> None:
        if self._card:
            self.words[self._card] += data + " "


def _pixels(uri: str | None) -> Array:
    assert uri is not None and uri.startswith("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


@pytest.fixture(scope="module")
def text() -> str:
    return catalogue(seed=1)


@pytest.fixture(scope="module")
def page(text: str) -> _Page:
    return _Page(text)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forge of three methods, where the page is made more than once."""
    monkeypatch.setattr(module, "METHODS", {name: METHODS[name] for name in ("swap", "relight")})
    monkeypatch.setattr(module, "HARMLESS", {"glasses": HARMLESS["glasses"]})


def test_every_method_is_on_the_page_which_needs_nothing_else(page: _Page, text: str) -> None:
    """Bug prevented: a method of the forge that the page leaves out, or a sentence on a method that is gone; a page
    that asks the network for something, runs code, or is too heavy to send."""
    table = METHODS | HARMLESS
    assert list(page.cards) == list(table) and set(IMITATES) == set(table)
    for name, pictures in page.cards.items():
        donors = int(table[name].needs_donor)
        assert len(pictures) == (1 + donors + 3 * 3 if name in METHODS else 1 + 2 * 3), name
        words = html.unescape(" ".join(page.words[name].split()))
        assert IMITATES[name] in words and (f"({table[name].df_class})" in words) == (name in METHODS)
        assert all(f"{word} {strength}" in words for word, strength in STRENGTHS)
        scores = re.findall(r": [a-z-]+ ([01]\.\d\d)", words)
        photo, donor = next(iter(module._portrait()))
        made = [forge(photo, table[name], module._rng(1, name), donor, s) for _, s in STRENGTHS]
        assert scores == [f"{c.score:.2f}" for f in made for c in f.cues], name
    assert len(text.encode()) < 150_000 * len(page.cards)  # bytes a method
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form"}
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?(https?:)?//", text)
    pictures = [values for tag, values in page.tags if tag == "img"]
    assert all(min(_pixels(values["src"]).shape[:2]) >= 100 for values in pictures)
    alts = [values["alt"] for values in pictures]
    assert all(alts) and len(set(alts)) == len(alts)  # nobody hears the same words for two pictures


def test_the_difference_is_to_the_original_shown(page: _Page) -> None:
    """Bug prevented: columns in the wrong order, or a difference of other pictures than those beside it."""
    original, *pictures = [_pixels(v["src"]).astype(int) for v in page.cards["relight"] if "mask" not in str(v["alt"])]
    changed, differences = pictures[:3], pictures[3:]
    seen = [float(np.abs(c - original).mean()) for c in changed]
    assert 3 < seen[0] < seen[1] < seen[2]
    for picture, heat in zip(changed, differences, strict=True):
        change = np.abs(picture - original).max(-1)
        glow = heat.sum(-1)
        assert np.corrcoef(np.minimum(change * module.AMPLIFY, 255).ravel(), glow.ravel())[0, 1] > 0.9
        assert glow[change == 0].mean() < 60
    told = [float(level) for level in re.findall(r"(\d+\.\d) levels under the mask", page.words["relight"])]
    assert told == sorted(told) and told[0] < told[2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two people's photos, a fake, a file that is no picture; sources with markup in their names."""
    face = np.array(skimage.data.astronaut()[10:260, 100:350])
    for name, pixels in (("a.png", face), ("b.png", face[:, ::-1]), ("c.png", 255 - face)):
        cv2.imwrite(str(tmp_path / name), pixels[..., ::-1])
    (tmp_path / "d.png").write_bytes(b"no picture")
    rows = [
        {"path": f"{name}.png", "label": "fake" if name == "c" else "real", "group": name, "source": source}
        for name, source in zip("abcd", ("<script>alert(1)</script>", '"><b>&amp;', "inverted", "broken"), strict=True)
    ]
    manifest = tmp_path / "photos.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def test_photos_of_a_manifest(few: None, photos: Path) -> None:
    """Bug prevented: HTML in a source name that runs or breaks the page; a fake shown as somebody's original."""
    text = catalogue(photos, seed=2)
    page = _Page(text)
    assert "<script" not in text and "script" not in {tag for tag, _ in page.tags}
    assert list(page.cards) == ["swap", "relight", "glasses"]
    assert all(s in page.words["swap"] for s in ("<script>alert(1)</script>", '"><b>&amp;'))  # photo and donor, as text
    assert "inverted" not in text and "broken" not in text
    photos.write_text(photos.read_text("utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with raises("too_few_photos", 1):  # a face swapped with itself, or a search without end
        catalogue(photos)


# --- files and commands ---------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a half-written page in the place of yesterday's good one, or litter beside it."""
    page = tmp_path / "page.html"
    page.write_bytes(b"good")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    says(CliRunner().invoke(app, ["catalogue", "--out", str(page)]).exception, "cannot_write", page, "No space left")
    assert page.read_bytes() == b"good" and [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.slow
def test_the_command_prints_what_it_wrote(few: None, tmp_path: Path) -> None:
    """Bug prevented: a command that is not registered."""
    page = tmp_path / "new" / "page.html"
    told = CliRunner().invoke(app, ["catalogue", "--out", str(page), "--seed", "5"])
    assert (told.exit_code, told.stdout) == (0, f"{page}\n"), told.output
    assert page.read_text("utf-8") == catalogue(seed=5)

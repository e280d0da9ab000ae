"""The catalogue and the contact sheet show what the forge did, whole, alike on every run, and in its place."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections import Counter
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
from data_gen.catalogue import IMITATES, LINE, STRENGTHS, catalogue, contact_sheet, write
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


_COLOURS = {"swap": (0, 0, 200), "relight": (0, 200, 0), "none": (200, 0, 0)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of plain pictures, 120 x 60, coloured by method: nine swaps, three relit, two untouched; masks for two."""
    rows: list[dict[str, Any]] = []
    for method, n in (("swap", 9), ("relight", 3), ("none", 2)):
        for i in range(n):
            label = "real" if method == "none" else "fake"
            row: dict[str, Any] = {"path": f"{method}{i}.png", "label": label, "method": method}
            Image.new("RGB", (120, 60), _COLOURS[method]).save(tmp_path / row["path"])
            if method == "relight":
                mask = np.zeros((60, 120), np.uint8)
                mask[10:30, 80:110] = 120  # faint, as where a blend is half transparent
                cv2.imwrite(str(tmp_path / f"{i}.mask.png"), mask)
                row |= {"mask": f"{i}.mask.png", "strength": 0.25, "df_class": "FE"}
            rows.append(row)
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return tmp_path


def _tiles(sheet: Image.Image, side: int) -> Counter[str]:
    """How many tiles of each method there are, by their pixels."""
    pixels = np.asarray(sheet).astype(int)
    area = side * side // 2
    return Counter({m: round(float((np.abs(pixels - c).max(-1) < 3).sum() / area)) for m, c in _COLOURS.items()})


def test_methods_take_turns(run: Path) -> None:
    """Bug prevented: a sheet full of the method that happens to be frequent, or a picture shown twice."""
    assert _tiles(contact_sheet(run, 6, 64), 64) == {"swap": 2, "relight": 2, "none": 2}
    assert _tiles(contact_sheet(run, 9, 64), 64) == {"swap": 4, "relight": 3, "none": 2}
    assert _tiles(contact_sheet(run, 500, 64), 64) == {"swap": 9, "relight": 3, "none": 2}
    with raises("sheet_too_large", "--count", "--tile"):
        contact_sheet(run, tile=20_000)
    for i in range(9):  # else the swaps look the same
        Image.new("RGB", (120, 60), (0, 0, 20 * i)).save(run / f"swap{i}.png")
    one, same, other = (np.asarray(contact_sheet(run, 5, 48, seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_the_outline_is_on_the_tile(run: Path) -> None:
    """Bug prevented: an outline at the mask's own scale, beside what was changed; none where the mask is faint."""
    manifest = run / "manifest.jsonl"
    [row] = [r for r in manifest.read_text("utf-8").splitlines() if "relight0" in r]
    manifest.write_text(row + "\n", encoding="utf-8")
    sheet = np.asarray(contact_sheet(run, 1, 240)).astype(int)
    ys, xs = np.nonzero(np.abs(sheet - _COLOURS["relight"]).max(-1) < 3)
    left, top = xs.min(), ys.min()
    assert (xs.max() + 1 - left, ys.max() + 1 - top) == (240, 120)
    ys, xs = np.nonzero(np.abs(sheet - LINE).max(-1) < 3)
    box = np.array([xs.min() - left, ys.min() - top, xs.max() + 1 - left, ys.max() + 1 - top])
    assert np.abs(box - [160, 20, 220, 60]).max() <= 2


@pytest.mark.parametrize(
    ("spoil", "code", "fact"),
    [
        (lambda run: (run / "manifest.jsonl").unlink(), "manifest_not_found", "manifest.jsonl"),
        (lambda run: (run / "none0.png").unlink(), "picture_unreadable", "none0.png: "),
        (lambda run: (run / "0.mask.png").unlink(), "mask_unreadable", "0.mask.png"),
        (lambda run: (run / "0.mask.png").write_bytes(b"?"), "mask_unreadable", "0.mask.png"),
        (lambda run: Image.new("L", (60, 120)).save(run / "0.mask.png"), "mask_size_differs", "0.mask.png"),
    ],
)
def test_a_spoilt_run_is_named(run: Path, spoil: Any, code: str, fact: str) -> None:
    """Bug prevented: a grey tile, or a mask stretched over a picture that it does not belong to."""
    spoil(run)
    with raises(code, fact):
        contact_sheet(run)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a half-written page in the place of yesterday's good one, or litter beside it."""
    page = tmp_path / "page.html"
    write(page, b"good")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with raises("cannot_write", page, "No space left on device"):
        write(page, b"better")
    assert page.read_bytes() == b"good" and [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.slow
def test_the_commands_print_what_they_wrote(few: None, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Bug prevented: a command that is not registered, or writes a format that the name does not say; two runs that
    differ."""
    sheet, page = tmp_path / "new" / "sheet.png", tmp_path / "new" / "page.html"
    told = CliRunner().invoke(app, ["contact-sheet", "--run", str(run), "--out", str(sheet), "--tile", "48"])
    assert (told.exit_code, told.stdout) == (0, f"{sheet}\n"), told.output
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
    told = CliRunner().invoke(app, ["catalogue", "--out", str(page), "--seed", "5"])
    assert (told.exit_code, told.stdout) == (0, f"{page}\n"), told.output
    one = page.read_text("utf-8")
    assert one == catalogue(seed=5) and catalogue(seed=6) != one
    monkeypatch.setattr(module, "METHODS", {"relight": METHODS["relight"]})  # other methods change no example
    assert _Page(catalogue(seed=5)).cards["relight"] == _Page(one).cards["relight"]
    words = ["contact-sheet", "--run", str(run), "--out", str(tmp_path / "sheet.gif")]
    says(CliRunner().invoke(app, words).exception, "sheet_format_unknown", ".png")
    assert not (tmp_path / "sheet.gif").exists()

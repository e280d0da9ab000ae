"""`python -m data_gen catalogue`: a page for people that shows the work of the forge.

One self-contained page with every forge method and every harmless change, each on one photo at three strengths:
picture, mask, difference, cues. The same input and seed give the same page.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import cv2
import jinja2
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from data_gen.forge import HARMLESS, METHODS, Forgery, Method, Photo, forge
from data_gen.run_forge import ForgeConfig, load_photo
from x2dfd.degrade import Pixels, Rng, tone
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.faces import find_faces
from x2dfd.files import Json, write_text
from x2dfd.manifest import Sample, read_manifest

STRENGTHS = (("faint", 0.1), ("middle", 0.5), ("blatant", 0.9))
AMPLIFY = 6  # the difference is shown this many times as large
SHOWN = 256  # longest side of a picture in the catalogue: a face of a run's usual size is shown pixel for pixel
ORANGE, LINE = (230, 159, 0), (255, 204, 92)  # the mask and its outline

CLASSES = {
    "FS": "face swapping",
    "FR": "face reenactment",
    "FE": "face editing",
    "EFS": "entire face synthesis",
    "real": "stays real",
}
_WORDS = Path(__file__).parent / "words"
IMITATES: dict[str, str] = json.loads((_WORDS / "imitates.json").read_text("utf-8"))
"""A sentence for each method about the thing that it imitates."""


def _portrait() -> Iterator[tuple[Photo, Photo]]:
    """NASA's portrait of Eileen Collins (public domain) and, as a donor, the same mirrored and in other light."""
    try:
        from skimage.data import astronaut
    except ImportError as error:
        raise SetupError(
            "without --data, the photo is that of scikit-image: pip install -e '.[bench]'", code="package_missing"
        ) from error
    pixels = np.ascontiguousarray(astronaut()[:250, 110:360], np.uint8)
    photo = Photo(pixels, find_faces(pixels)[0].landmarks, "NASA portrait, scikit-image", "portrait")
    # A fixed seed: the donor is the same whatever the examples.
    mirrored = np.clip(tone(pixels[:, ::-1], 0.8, _rng(5)), 0, 255).astype(np.uint8)
    donor = Photo(mirrored, find_faces(mirrored)[0].landmarks, "the same portrait, mirrored, in other light", "twin")
    while True:
        yield photo, donor


def _rng(seed: int, name: str = "") -> Rng:
    """A separate generator for each name, so that a new method does not change the examples of others."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _pairs(data: Path, seed: int) -> Iterator[tuple[Photo, Photo]]:
    """(photo, donor) of two groups each, without end: a random picture of each group, sources taking turns."""
    rng = _rng(seed)
    source_of_group: dict[str, str] = {}  # group -> source
    by_source: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in read_manifest(data):
        if sample.label == "real":  # a person of two sources belongs to the first, else they could be their own donor
            by_source[source_of_group.setdefault(sample.group, sample.source)][sample.group].append(sample)
    queues = []
    for _, groups in sorted(by_source.items()):
        names = sorted(groups)
        queues.append([groups[names[i]] for i in rng.permutation(len(names))])
    groups_in_turn = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
    usable: list[Photo] = []
    for group in groups_in_turn:
        sample = group[int(rng.integers(len(group)))]
        photo = load_photo(str(sample.path), sample.source, sample.group, ForgeConfig.side)
        if photo is None:
            continue
        usable.append(photo)
        if len(usable) > 1:
            yield photo, usable[-2]
    if len(usable) < 2:
        raise X2DFDError(
            f"{data}: real photos with faces of two groups are needed; found {len(usable)}", code="too_few_photos"
        )
    while True:
        for i, photo in enumerate(usable):
            yield photo, usable[i - 1]


def catalogue(data: Path | None = None, seed: int = 0) -> str:
    """The page: a card for every forge method and harmless change, on photos of a manifest or on scikit-image's
    portrait. Raises X2DFDError for a manifest without two usable photos, SetupError without scikit-image."""
    pairs = _pairs(data, seed) if data else _portrait()
    sections = [
        [_card(method, *pair, seed) for method, pair in zip(table.values(), pairs, strict=False)]
        for table in (METHODS, HARMLESS)
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string((_WORDS / "catalogue.html.jinja").read_text("utf-8"))
    html = page.render(forgeries=sections[0], harmless=sections[1], amplify=AMPLIFY, full=round(255 / AMPLIFY))
    return html.encode("utf-8", "backslashreplace").decode("utf-8")  # a source may be named in bytes that are no UTF-8


def _card(method: Method, photo: Photo, donor: Photo, seed: int) -> Json:
    """The page's data on one method. Each strength starts from the same generator state and makes the same choices."""
    forgeries = [forge(photo, method, _rng(seed, method.name), donor, strength) for _, strength in STRENGTHS]
    window = _window(photo, np.max([f.mask for f in forgeries], axis=0), method.df_class == "real")
    columns = []
    for (word, strength), forgery in zip(STRENGTHS, forgeries, strict=True):
        change = np.abs(forgery.pixels.astype(np.int16) - photo.pixels).max(-1)  # [H, W]
        touched = change[forgery.mask > 0] if forgery.mask.any() else change
        columns.append(
            {
                "word": word,
                "strength": f"{strength:.1f}",
                "picture": _jpeg_uri(_shrunk(forgery.pixels[window])),
                "mask": _jpeg_uri(_overlay(forgery, window), 80) if forgery.mask.any() else None,
                "masked": round(100 * float((forgery.mask > forgery.mask.max() / 2).mean())),
                "difference": _jpeg_uri(_heat(change[window]), 80),
                "change": f"{touched.mean():.1f}",
                "cues": [(c.area, c.artifact, c.score) for c in forgery.cues],
            }
        )
    return {
        "name": method.name,
        "df_class": method.df_class,
        "class_words": CLASSES[method.df_class],
        "imitates": IMITATES[method.name],
        "original": _jpeg_uri(_shrunk(photo.pixels[window])),
        "donor": _jpeg_uri(_shrunk(donor.pixels[_window(donor, None)])) if method.needs_donor else None,
        "source": photo.source,
        "donor_source": donor.source,
        "columns": columns,
    }


def _window(photo: Photo, mask: Pixels | None, whole: bool = False) -> tuple[slice, slice]:
    """The part of a photo to show: its face and the mask around it, cut close so that faint traces survive shrinking,
    or all of it with `whole`. For a mask of the whole picture, the face is enough."""
    height, width = photo.pixels.shape[:2]
    if whole:
        return slice(0, height), slice(0, width)
    low, high = photo.landmarks.min(0), photo.landmarks.max(0)
    margin = 0.15 * float((high - low).max())
    low, high = low - margin, high + margin
    if mask is not None and not mask.all():
        ys, xs = np.nonzero(mask > 32)
        if len(xs):
            low, high = np.minimum(low, (xs.min(), ys.min())), np.maximum(high, (xs.max() + 1, ys.max() + 1))
    half, centre = float((high - low).max()) / 2, (low + high) / 2
    (x0, y0), (x1, y1) = np.maximum(np.rint(centre - half), 0).astype(int), np.rint(centre + half).astype(int)
    return slice(y0, min(y1, height)), slice(x0, min(x1, width))


def _shrunk(pixels: Pixels) -> Pixels:
    """At most SHOWN pixels long; never enlarged."""
    return _fit(pixels) if max(pixels.shape[:2]) > SHOWN else pixels


def _fit(pixels: Pixels) -> Pixels:
    """The longer side is SHOWN pixels."""
    height, width = pixels.shape[:2]
    scale = SHOWN / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, size, interpolation=interpolation), np.uint8)


def _overlay(forgery: Forgery, window: tuple[slice, slice]) -> Pixels:
    """The forged picture in grey, the mask's weight in orange upon it, with a line where that is at half its height."""
    pixels, mask = _fit(forgery.pixels[window]), _fit(forgery.mask[window])
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    weight = 0.5 * mask.astype(np.float32)[..., None] / 255
    tinted = 0.85 * grey * (1 - weight) + np.array(ORANGE, np.float32) * weight
    out = np.clip(tinted, 0, 255).astype(np.uint8)
    lines, _ = cv2.findContours((mask > mask.max() / 2).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(out, lines, -1, (20, 24, 30), 3)  # dark below bright: seen on any picture
    cv2.drawContours(out, lines, -1, LINE, 1)
    return out


def _heat(change: NDArray[np.int16]) -> Pixels:
    """Grey levels of change [H, W] as colours from black to bright yellow, amplified."""
    amplified = _shrunk(np.clip(change * AMPLIFY, 0, 255).astype(np.uint8))
    return np.asarray(cv2.applyColorMap(amplified, cv2.COLORMAP_INFERNO)[..., ::-1], np.uint8)


def _jpeg_uri(pixels: Pixels, quality: int = 90) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


EPILOG = """Examples:\n
  python -m data_gen catalogue --out build/catalogue.html\n
  python -m data_gen catalogue --data photos.csv --out build/catalogue.html --seed 3
"""


def command(
    out: Annotated[Path, typer.Option(help="HTML file to write")],
    data: Annotated[Path | None, typer.Option(help="manifest of photos; scikit-image's portrait if none")] = None,
    seed: Annotated[int, typer.Option(min=0, help="chooses photos and what each method does")] = 0,
) -> None:
    """Every forge method and harmless change on one page: picture, mask, difference, cues at three strengths."""
    page = catalogue(data, seed)
    try:
        write_text(out, page)
    except OSError as error:
        raise X2DFDError(f"cannot write {out}: {error.strerror or error}", code="cannot_write") from error
    print(out)

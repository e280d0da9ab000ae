"""Decodes a picture's bytes with Pillow into upright sRGB pixels on white, and notes the changes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image, ImageCms, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError, features

from x2dfd.errors import InputError
from x2dfd.files import Json, printed_from_c
from x2dfd.sniffing import MAX_PIXELS, Budget, Metered, check_bytes, check_size, check_structure, plain, read, walk_ifds

MAX_REDUCED_PIXELS = 260_000_000
"""For a JPEG, which can be decoded at a half, a quarter or an eighth of its size; phones make up to 200 million."""
HEIC_INSTALL = "pip install 'x2dfd[heic]'"

# Pillow reports some broken TIFFs through logging; without a handler Python would print them on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture."""

    pixels: NDArray[np.uint8]  # [H, W, 3] RGB, EXIF orientation applied
    sha256: str  # of the file's bytes; for an image object see the note `hash_of_pixels`
    format: str  # "JPEG", "PNG", ...; "PIL" for an image object
    n_frames: int  # pictures in the file; the first one is decoded
    notes: tuple[str, ...]  # changes by decoding: "exif_orientation:6", "alpha_on_white", ...
    path: str | None  # as given by the caller; None for bytes and image objects
    file: Json = field(default_factory=dict)  # of the file: `bytes`, `modified` (of a path), `exif`
    provenance: Json = field(default_factory=lambda: {"state": "not_checked"})  # see x2dfd.provenance


_PILLOW = threading.RLock()  # warning filters are global to the process: two threads would restore each other's


@contextmanager
def pillow(notes: list[str]) -> Iterator[None]:
    """Run Pillow: its warnings become notes, its many exceptions one InputError."""
    with _PILLOW, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise InputError("too_many_pixels", f"more pixels than the {MAX_PIXELS:,} that are decoded") from error
        except UnidentifiedImageError as error:
            raise InputError("corrupt", "the picture's header cannot be read") from error
        except Exception as error:  # a parser fed with hostile bytes raises nearly anything
            text = plain(str(error))
            if isinstance(error, EOFError) or "truncated" in text.lower():
                raise InputError(
                    "truncated", "the file ends before its picture does: an unfinished download?"
                ) from error
            raise InputError("corrupt", f"the picture's data are damaged ({text or type(error).__name__})") from error
    # too many pixels need no note: the caller's own check refuses them
    bombs = Image.DecompressionBombWarning
    notes += [f"warning:{plain(str(w.message))}" for w in caught if not issubclass(w.category, bombs)]


# Its messages begin with the file's name, which is Pillow's, or with the function or the codec that complains.
_LIBTIFF = re.compile(
    rb"tempfile\.tif|\w*(TIFF|Strip|Decode|Setup|Predictor|JPEG|LZW|ZIP|LZMA|ZSTD|WebP|Fax|Luv|PixarLog)\w*[:,]"
)


@dataclass(eq=False)
class Opened:
    """An image file whose header was read and checked, but no pixel decoded."""

    image: Image.Image
    data: bytes
    name: str  # format
    n_frames: int
    orientation: int  # of EXIF, where Pillow does not apply it
    budget: Budget
    notes: list[str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def open_image(file: BinaryIO, name: str) -> Opened:
    """Read the whole file, check its structure, and read its header. Raises InputError."""
    data = read(file)
    check_bytes(len(data))
    _require_decoder(name)
    notes: list[str] = []
    budget = Budget.of(len(data))
    n_frames = check_structure(data, name, budget, notes)
    metered = cast(BinaryIO, Metered(io.BytesIO(data), budget))
    with pillow(notes):
        # Image.open would refuse from 179 million pixels on, of a JPEG too
        image = JpegImagePlugin.jpeg_factory(metered) if name == "JPEG" else Image.open(metered, formats=[name])
        _reduce(image, notes)
        check_size(*image.size)
        if n_frames is None:
            n_frames = int(getattr(image, "n_frames", 1))
        orientation = 1
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image)
        else:
            orientation = walk_ifds(_exif_blob(image), budget).orientation
    return Opened(image, data, name, n_frames, orientation, budget, notes)


def _reduce(image: Image.Image, notes: list[str]) -> None:
    """Set up a JPEG of more than MAX_PIXELS to be decoded at the largest fraction of its size within that limit."""
    width, height = image.size
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or not MAX_PIXELS < width * height <= MAX_REDUCED_PIXELS:
        return
    factor = next(factor for factor in (2, 4, 8) if width * height <= MAX_PIXELS * factor**2)
    image.draft(None, (width // factor, height // factor))
    notes.append(f"reduced_from:{width}x{height}")


def decode(opened: Opened, path: str | None) -> Picture:
    """The file's first picture."""
    image, notes = opened.image, opened.notes
    if opened.n_frames > 1:
        notes.append(f"first_of_{opened.n_frames}_frames")
    depth = sample_bits(opened)
    inverted = False
    with pillow(notes):
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            inverted = image.tag_v2.get(262) == 0  # WhiteIsZero
            tiff_orientation = image.tag_v2.get(274, 1)  # applied by Pillow while loading, in TIFF only
            messages: list[bytes] = []  # of libtiff, which does not report damage otherwise
            with printed_from_c(_LIBTIFF, messages):
                image.load()
            notes += [f"warning:{plain(line.decode(errors='replace'))}" for line in messages[:1]]
            if tiff_orientation in _TURN:
                notes.append(f"exif_orientation:{tiff_orientation}")
        else:
            image.load()
        exif = exif_summary(opened)
    pixels = rgb(image, depth, inverted, opened.orientation, notes)
    remarks = tuple(dict.fromkeys(notes))
    return Picture(pixels, opened.sha256, opened.name, opened.n_frames, remarks, path, {"exif": exif} if exif else {})


_EXIF = {271: "make", 272: "model", 305: "software", 306: "changed", 36867: "taken", 36868: "digitised"}
"""Tags of EXIF 3.0 that are quoted; not names, comments, serial numbers and coordinates, which are about people."""


def _exif_blob(image: Image.Image) -> bytes:
    """The EXIF that Pillow would parse; in a PNG written by ImageMagick it is in a text."""
    raw = image.info.get("Raw profile type exif", "")
    blob: bytes = image.info.get("exif") or bytes.fromhex("".join(str(raw).split("\n")[3:]))
    return blob.removeprefix(b"Exif\0\0")


def exif_summary(opened: Opened) -> dict[str, str]:
    """Camera, software and times as the file states them (anyone can write them), and whether it states a place."""
    try:
        if opened.name == "PNG":  # its EXIF may follow its pixels
            walk_ifds(_exif_blob(opened.image), opened.budget)
        tags = opened.image.getexif()
        values = dict(tags) | dict(tags.get_ifd(0x8769))
        has_location = bool(tags.get_ifd(0x8825))
    except Exception as error:  # a parser fed with hostile bytes raises nearly anything; the picture itself was read
        opened.notes.append(f"exif_unreadable:{type(error).__name__}")
        return {}
    summary = {name: plain(str(values[tag]), 80) for tag, name in _EXIF.items() if values.get(tag)}
    return summary | ({"place": "stated, not copied here"} if has_location else {})


def from_image(image: Image.Image) -> Picture:
    """A picture from an image object; its hash covers mode, size, palette, transparency, profile, orientation, data."""
    notes = ["hash_of_pixels"]
    check_size(*image.size)
    with pillow(notes):
        image.load()
        orientation = image.getexif().get(274, 1)
        palette = (image.palette.mode, image.palette.tobytes()) if image.palette else None
        profile = image.info.get("icc_profile")
        identity = (image.mode, image.size, palette, image.info.get("transparency"), profile, orientation)
        digest = hashlib.sha256(repr(identity).encode())
        digest.update(image.tobytes())
    pixels = rgb(image, 16 if image.mode.startswith("I") else 8, False, orientation, notes)
    n_frames = 1
    with pillow(notes), contextlib.suppress(ValueError):  # a closed file can no longer be counted
        n_frames = _frames_of(image)
        if n_frames > 1:
            notes.append(f"first_of_{n_frames}_frames" if image.tell() == 0 else f"one_of_{n_frames}_frames")
    return Picture(pixels, digest.hexdigest(), "PIL", n_frames, tuple(dict.fromkeys(notes)), None)


def _frames_of(image: Image.Image) -> int:
    """The number of frames in the picture's file; 1 without a file.

    GIF and TIFF are counted by seeking, which would undo what the caller did to the picture: another object of the same
    file counts theirs.
    """
    if not isinstance(image, GifImagePlugin.GifImageFile | TiffImagePlugin.TiffImageFile):
        return int(getattr(image, "n_frames", 1))
    if (stream := getattr(image, "_fp", None) or image.fp) is None:  # the first is kept when the picture was loaded
        return 1
    at = stream.tell()
    stream.seek(0)
    try:
        with Image.open(io.BytesIO(stream.read())) as other:
            return int(getattr(other, "n_frames", 1))
    finally:
        stream.seek(at)


def _require_decoder(name: str) -> None:
    if name == "HEIF":
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            reason = f"HEIC needs the package pillow-heif ({HEIC_INSTALL}), or save the photo as JPEG"
            raise InputError("unsupported_format", reason) from error
    if name in ("WEBP", "AVIF") and not features.check(name.lower()):
        raise InputError("unsupported_format", f"this installation of Pillow cannot read {name}")
    if name not in Image.OPEN:
        Image.init()
    if name not in Image.OPEN:  # Image.open would answer with a bare KeyError
        raise InputError("unsupported_format", f"this installation of Pillow cannot read {name}")


_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)  # none, CCITT, LZW, JPEG, deflate, PackBits: no rare decoder


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    compression = image.tag_v2.get(259, 1)
    if compression not in _TIFF_COMPRESSIONS:
        raise InputError("unsupported_format", f"TIFF compression {compression} is not supported")
    width, height = image.tag_v2.get(322, 1), image.tag_v2.get(323, 1)
    if width * height > MAX_PIXELS:
        raise InputError("too_many_pixels", f"tiles of {width} x {height} pixels")


def sample_bits(opened: Opened) -> int:
    """Bits of a sample as stored; Pillow reduces 16-bit colour to 8 bits without a warning."""
    image = opened.image
    if opened.name == "PNG":
        return opened.data[24]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(max(image.tag_v2.get(258, (8,))))
    return 16 if image.mode.startswith("I") else 8


_STRIP = 4_000_000  # pixels that are converted at a time

# The turns that undo each EXIF orientation: quarter turns counterclockwise, after an optional left-right mirror.
_TURN: dict[int, tuple[bool, int]] = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip


def rgb(image: Image.Image, bits: int, inverted: bool, orientation: int, notes: list[str]) -> NDArray[np.uint8]:
    """[H, W, 3] RGB, upright, in sRGB, on white."""
    wide = image.mode.startswith("I") or image.mode == "F"
    if not wide and bits == 16 and image.format in ("PNG", "TIFF"):
        notes.append("16bit_to_8bit")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(_STRIP // image.width, 1)
    for top in range(0, image.height, rows):  # whole copies of a large picture in every mode would take a gigabyte
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if wide:
            strip = Image.fromarray(_to_8_bit(strip, bits, inverted, notes))
        with pillow(notes):
            colour, alpha = _split_alpha(strip)
            colour = _to_srgb(colour, image.info.get("icc_profile"), notes)
            if colour.mode == "CMYK":
                notes.append("cmyk_to_rgb")
            if colour.mode != "RGB":
                colour = colour.convert("RGB")
            if alpha is not None and alpha.getextrema()[0] != 255:
                notes.append("alpha_on_white")
                colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
            pixels[top : top + rows] = np.asarray(colour)
    if orientation in _TURN:
        notes.append(f"exif_orientation:{orientation}")
        mirror, turns = _TURN[orientation]
        pixels = np.ascontiguousarray(np.rot90(pixels[:, ::-1] if mirror else pixels, turns))
    return pixels


def _to_8_bit(image: Image.Image, bits: int, inverted: bool, notes: list[str]) -> NDArray[np.uint8]:
    """[H, W] grey from integers of up to 16 bits, or from floats between 0 and 1."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also when either is NaN
            raise InputError("unsupported_format", "floating-point samples outside 0 to 1 have no agreed white")
        notes.append("float_to_8bit")
        wide = values.astype(np.float64)
        return np.round((1.0 - wide if inverted else wide) * 255).astype(np.uint8)
    if low < 0 or high > 65_535 or bits > 16:
        raise InputError("unsupported_format", "integer samples of more than 16 bits have no agreed white")
    notes.append(f"{12 if bits == 12 else 16}bit_to_8bit")
    shades = np.minimum(np.arange(65_536) / (4095.0 if bits == 12 else 65_535.0), 1.0)
    if inverted:
        shades = 1.0 - shades
    result: NDArray[np.uint8] = np.round(shades * 255).astype(np.uint8)[values]
    return result


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour as L, RGB or CMYK, and the alpha channel if there is one."""
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")), None


def _to_srgb(image: Image.Image, profile_bytes: bytes | None, notes: list[str]) -> Image.Image:
    if not profile_bytes:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile_bytes))
        name = plain(ImageCms.getProfileDescription(profile), 60)
        if "srgb" in name.lower():
            return image  # a round trip would only add rounding
        if profile.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")  # grey pictures often carry the camera's colour profile
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        notes.append(f"icc_ignored:{plain(str(error), 60)}")
        return image
    if converted is None:  # only in-place conversion returns None
        raise RuntimeError("profileToProfile gave no image")
    notes.append(f"icc_to_srgb:{name}")
    return converted

"""Pictures and clips as files, for tests that need bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def encoded(picture: Image.Image | Pixels, format: str, **options: Any) -> bytes:
    """The picture as a file of Pillow's `format`, with options of its writer."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes = b"") -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_begin(width: int, height: int, depth: int = 8) -> bytes:
    """What a colour PNG begins with."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))


def png_of(width: int, height: int, packed: bytes, depth: int = 8) -> bytes:
    """A colour PNG of these sides, whatever its `packed` pixels hold."""
    return png_begin(width, height, depth) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND")


def clip_of(
    pictures: Iterable[Pixels], codec: str = "mpeg4", format: str = "mp4", *, rate: int = 25, **settings: Any
) -> bytes:
    """A clip of pictures of one size. `settings`: attributes of the encoder's context."""
    pictures, buffer = list(pictures), io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for name, value in ({"bit_rate": 3_000_000, "gop_size": 12} | settings).items():
            setattr(stream.codec_context, name, value)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()

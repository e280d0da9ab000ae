"""Pictures and clips as files, for tests that need bytes."""

from __future__ import annotations

import io
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

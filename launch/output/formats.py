"""The files that a video can become, by the ending of its name: mp4, webm, gif, or a folder of png; and pictures.

Each is made of segments (`launch/output/segments.py`) and appears when it is whole.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from engine.files import atomic_write, part_of
from launch.media import pulled
from launch.output.names import FOLDER
from launch.output.segments import H264, LOSSLESS, TICKS, VP9, Codec, container_in, decode, join, pixels

Segments = Callable[[], Iterable[BinaryIO]]
"""The segments of a video, or a stream of them, from the start each time that it is called."""
_GIF_COLOURS = ("palettegen", "stats_mode=diff")
_GIF_USE = ("paletteuse", "dither=bayer:bayer_scale=5:diff_mode=rectangle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """What a video becomes."""

    codec: Codec  # of its segments
    finish: Callable[[Segments, Path, int], None]  # makes the file, at so many frames per second


def _joined(kind: str) -> Callable[[Segments, Path, int], None]:
    def finish(segments: Segments, path: Path, fps: int) -> None:
        with atomic_write(path) as file:
            join(segments(), file, kind, fps)

    return finish


def _gif(segments: Segments, path: Path, fps: int) -> None:
    """Two passes: the colours of all frames first, then the frames in them."""
    first = next(iter(decode(segments())))
    colours = Graph()
    colours.link_nodes(_source(colours, first, fps), colours.add(*_GIF_COLOURS), colours.add("buffersink")).configure()
    for frame in decode(segments()):
        colours.push(frame)
    colours.push(None)
    palette = colours.pull()
    assert isinstance(palette, VideoFrame)
    graph = Graph()
    pictures, table = _source(graph, first, fps), _source(graph, palette, fps)
    use, sink = graph.add(*_GIF_USE), graph.add("buffersink")
    pictures.link_to(use, 0, 0)
    table.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    table.push(palette)
    table.push(None)
    with atomic_write(path) as file, container_in(file, "gif", {"loop": "0"}) as container:
        stream = container.add_stream("gif", rate=fps)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "pal8"
        for number, frame in enumerate(decode(segments())):
            frame.pts = number * TICKS
            pictures.push(frame)
            for picture in pulled(graph):
                container.mux(stream.encode(picture))
        pictures.push(None)
        for picture in pulled(graph):
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _source(graph: Graph, frame: VideoFrame, fps: int) -> FilterContext:
    base = Fraction(1, fps * TICKS)
    return graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)


def _pictures(segments: Segments, path: Path, fps: int) -> None:
    """A folder of 000000.png and so on; it takes the place of an empty one."""
    part = part_of(path)
    try:
        part.mkdir()
        for number, frame in enumerate(decode(segments())):
            (part / f"{number:06}.png").write_bytes(png(pixels(frame)))
        os.rename(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture, uint8 [H, W, 3], as the bytes of a PNG file."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1, 1)
    frame = VideoFrame.from_ndarray(picture, format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


MP4 = Format(codec=H264, finish=_joined("mp4"))
FORMATS = {
    ".mp4": MP4,
    ".webm": Format(codec=VP9, finish=_joined("webm")),
    ".gif": Format(codec=LOSSLESS, finish=_gif),
    FOLDER: Format(codec=LOSSLESS, finish=_pictures),
}
"""By the ending of the name."""

"""Pictures and clips that a video starts from. That frames become a prefix is the engine's business.

A file may come from anybody. FFmpeg is handed an open file and the formats that it may find in it, so it opens nothing
by name: no address, no playlist, no script that lists other files.
"""

import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import av.logging
import torch
from av.filter import Graph
from av.video.frame import VideoFrame
from torch import Tensor

from launch.options import ClipEnd, Fit
from models.errors import InputError

PREFIX_FRAMES = 32
"""How many frames of a clip are continued, after resampling (specification part 3)."""
_TAIL = 1.5  # times what is needed is looked at first, at the end of a clip
_PIXELS = (2**31 - 1) // 8  # of a picture with 128 more on each side: FFmpeg takes no more
_LATENT_FRAMES = 4  # one latent frame stands for four frames
# Names of FFmpeg's demuxers, none of which opens further files.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf,nut,y4m,yuv4mpegpipe,"
    "h264,hevc,m4v,obu,mjpeg,gif,apng,png_pipe,jpeg_pipe,jpegxl_pipe,jpegxl_anim,webp,webp_pipe,bmp_pipe,tiff_pipe,"
    "ppm_pipe,pgm_pipe,pbm_pipe,pam_pipe,qoi_pipe,exr_pipe,wav,mp3,aac,flac"
)
# Those whose header says how large pictures are, so that it is known before one is decoded.
_BOUNDED_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
_TURNS = {90: ("transpose", "cclock"), 180: ("rotate", "PI"), 270: ("transpose", "clock")}  # to undo a rotation tag


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What a file from a stranger may ask of this machine."""

    pixels: int  # of a picture
    seconds: float  # of a clip
    decoded: int = 2**33  # pixels of all pictures that are decoded: a minute of 1080p at 60 per second, and more


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The size of a frame in pixels, and how it is filled; `bounds` of the file that it is read from, if there are."""

    height: int
    width: int
    fit: Fit = "stretch"
    bounds: Bounds | None = None


def is_clip(path: Path, bounds: Bounds) -> bool:
    """Whether a file has more than one picture; an `InputError` if it is neither a picture nor a video in bounds."""
    return len(_read(path, "picture or video", Frame(height=16, width=16, bounds=bounds), None, 2, "start")) > 1


def read_image(path: Path, frame: Frame) -> Tensor:
    """Read an image (or the first frame of a video), scaled bicubically (specification part 3).

    Returns uint8 [1, height, width, 3]; an `InputError` says why the file cannot be read or decoded.
    """
    return _read(path, "image", frame, None, 1, "start")


def read_video(path: Path, frame: Frame, *, fps: int, end: ClipEnd = "end") -> Tensor:
    """Read 32 frames of a clip at a frame rate, scaled bicubically (specification part 3): uint8 [F, height, width, 3].

    The released code takes the first ones; the last ones are what a video goes on from. A clip shorter than 32 frames
    is cut to a multiple of 4, since four frames make one latent frame. An `InputError` says that the file cannot be
    read or decoded, or has fewer than 4 frames.
    """
    frames = _read(path, "video", frame, fps, PREFIX_FRAMES, end)
    usable = len(frames) // _LATENT_FRAMES * _LATENT_FRAMES
    if not usable:
        found = f"{len(frames)} frame" + ("s" if len(frames) > 1 else "")
        raise InputError(
            f"the video {path} has only {found} at {fps} per second: at least {_LATENT_FRAMES} are needed, "
            "or give a still picture with --image"
        )
    return frames[:usable] if end == "start" else frames[-usable:]


def _read(path: Path, kind: str, frame: Frame, fps: int | None, limit: int, end: ClipEnd) -> Tensor:
    try:
        frames: list[VideoFrame] | deque[VideoFrame]
        if end == "start":
            frames = list(islice(_decode(path, frame, fps=fps), limit))
        else:
            last = _TAIL * limit / fps if fps else None
            frames = deque(_decode(path, frame, fps=fps, last=last), maxlen=limit)
            if len(frames) < limit:  # what the file says of its length is not so
                frames = deque(_decode(path, frame, fps=fps), maxlen=limit)
        pictures = [torch.from_numpy(one.to_ndarray(format="rgb24")) for one in frames]
    except av.ArgumentError:  # what FFmpeg says of a format that is not in the list
        most = "" if frame.bounds is None else f" of at most {frame.bounds.pixels:,} pixels"
        raise InputError(f"cannot read the {kind} {path}: it is neither a picture nor a video{most}") from None
    except (OSError, ValueError, av.FFmpegError) as error:
        if (address := re.match(r"(https?|ftp|rtmp|rtsp|s3|gs):/", str(path))) and not path.exists():
            name = f"{address[0]}/{path.relative_to(address[0])}"  # a path has lost a slash
            raise InputError(f"cannot read the {kind} {name}: only files are read, no addresses") from None
        reason = (frame.bounds is None and _refused_size(path)) or getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read the {kind} {path}: {reason}") from None
    if not pictures:
        raise InputError(f"cannot read the {kind} {path}: no frame in it can be decoded")
    return torch.stack(pictures)


def _refused_size(path: Path) -> str | None:
    """What FFmpeg logs of a picture that is too large for it, of a file that cannot be decoded."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as logged, suppress(OSError, ValueError, av.FFmpegError):
            next(_decode(path, Frame(height=16, width=16), fps=None), None)
    finally:
        av.logging.set_level(level)
    found = (re.match(r"Picture size (\d+x\d+) is invalid", text) for _, _, text in logged)
    size = next((one[1] for one in found if one), None)
    return size and f"its {size} pixels are too many, at most {_PIXELS:,} are read"


def _decode(path: Path, frame: Frame, *, fps: int | None, last: float | None = None) -> Iterator[VideoFrame]:
    """The frames of a file in order; with `last`, only those of about so many seconds at its end."""
    bounds, options = frame.bounds, {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    limit = {} if bounds is None else {"max_pixels": str(bounds.pixels)}
    if bounds is not None:
        options |= {"format_whitelist": _BOUNDED_FORMATS, **limit}
    with path.open("rb") as file, av.open(file, "r", options=options) as container:
        if not container.streams.video:
            raise ValueError("there is no picture in it")
        stream, graph, decoded = container.streams.video[0], None, 0
        if bounds is not None and (container.duration or 0) > bounds.seconds * av.time_base:
            raise ValueError(f"it is longer than {bounds.seconds:g} s")
        stream.codec_context.options = {**stream.codec_context.options, **limit}
        if last is not None and container.duration is not None:
            begin = container.duration - int(last * av.time_base) + (container.start_time or 0)
            if begin > 0:
                with suppress(av.FFmpegError):  # a file that cannot be searched is read from its start
                    container.seek(begin)
        for picture in container.decode(stream):
            decoded += picture.width * picture.height
            if bounds is not None and decoded > bounds.decoded:
                raise ValueError("it has too many pictures")
            if graph is None:
                graph = _graph(picture, stream, frame, fps=fps)
            graph.push(picture)
            yield from pulled(graph)
        if graph is not None:
            graph.push(None)
            yield from pulled(graph)


def _graph(first: VideoFrame, stream: av.VideoStream, frame: Frame, *, fps: int | None) -> Graph:
    """What the released code asks of ffmpeg: upright, at the frame rate, scaled with the bicubic scaler, to fit."""
    steps = [_TURNS[first.rotation % 360]] if first.rotation % 360 in _TURNS else []
    if fps is not None:
        steps.append(("fps", str(fps)))
    size = f"{frame.width}:{frame.height}"
    keep = {
        "stretch": "",
        "crop": ":force_original_aspect_ratio=increase",
        "pad": ":force_original_aspect_ratio=decrease",
    }
    steps += [("scale", f"{size}:flags=bicubic{keep[frame.fit]}"), ("format", "rgb24")]
    if frame.fit == "crop":
        steps.append(("crop", size))
    elif frame.fit == "pad":
        steps.append(("pad", f"{size}:(ow-iw)/2:(oh-ih)/2"))
    graph = Graph()
    source = graph.add_buffer(template=stream, width=first.width, height=first.height, format=first.format)
    graph.link_nodes(source, *(graph.add(*step) for step in steps), graph.add("buffersink")).configure()
    return graph


def pulled(graph: Graph) -> Iterator[VideoFrame]:
    """The frames that have come out of a graph of filters by now."""
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        if isinstance(frame, VideoFrame):
            yield frame

"""Pictures and clips that a video starts from. That frames become a prefix is the engine's business.

A file may come from anybody. FFmpeg is handed an open file and the formats that it may find in it, so it opens nothing
by name: no address, no playlist, no script that lists other files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import av.logging
import torch
from av.filter import Graph
from av.video.frame import VideoFrame
from torch import Tensor

from models.errors import InputError

PREFIX_FRAMES = 32
"""How many frames of a clip are continued: the first ones after resampling (specification part 3)."""
_PIXELS = (2**31 - 1) // 8  # of a picture with 128 more on each side: FFmpeg takes no more
_LATENT_FRAMES = 4  # one latent frame stands for four frames
# Names of FFmpeg's demuxers, none of which opens further files.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf,nut,y4m,yuv4mpegpipe,"
    "h264,hevc,m4v,obu,mjpeg,gif,apng,png_pipe,jpeg_pipe,jpegxl_pipe,jpegxl_anim,webp,webp_pipe,bmp_pipe,tiff_pipe,"
    "ppm_pipe,pgm_pipe,pbm_pipe,pam_pipe,qoi_pipe,exr_pipe,wav,mp3,aac,flac"
)
_TURNS = {90: ("transpose", "cclock"), 180: ("rotate", "PI"), 270: ("transpose", "clock")}  # to undo a rotation tag


def read_image(path: Path, *, height: int, width: int) -> Tensor:
    """Read an image (or the first frame of a video), stretched to the size, bicubic (specification part 3).

    Returns uint8 [1, height, width, 3]; an `InputError` says why the file cannot be read or decoded.
    """
    return _read(path, "image", fps=None, height=height, width=width, limit=1)


def read_video(path: Path, *, fps: int, height: int, width: int) -> Tensor:
    """Read the start of a video at a frame rate, stretched to the size, bicubic (specification part 3).

    A clip shorter than 32 frames is cut to a multiple of 4, since four frames make one latent frame.

    Returns:
        uint8 [F, height, width, 3], F is 32 or less.

    Raises:
        InputError: the file cannot be read or decoded, or has fewer than 4 frames.
    """
    frames = _read(path, "video", fps=fps, height=height, width=width, limit=PREFIX_FRAMES)
    usable = len(frames) // _LATENT_FRAMES * _LATENT_FRAMES
    if not usable:
        found = f"{len(frames)} frame" + ("s" if len(frames) > 1 else "")
        raise InputError(
            f"the video {path} has only {found} at {fps} per second: at least {_LATENT_FRAMES} are needed, "
            "or give a still picture with --image"
        )
    return frames[:usable]


def _read(path: Path, kind: str, *, fps: int | None, height: int, width: int, limit: int) -> Tensor:
    frames: list[Tensor] = []
    try:
        for frame in _decode(path, fps=fps, height=height, width=width):
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == limit:
                break
    except av.ArgumentError:  # what FFmpeg says of a format that is not in the list
        raise InputError(f"cannot read the {kind} {path}: it is neither a picture nor a video") from None
    except (OSError, ValueError, av.FFmpegError) as error:
        if (address := re.match(r"(https?|ftp|rtmp|rtsp|s3|gs):/", str(path))) and not path.exists():
            name = f"{address[0]}/{path.relative_to(address[0])}"  # a path has lost a slash
            raise InputError(f"cannot read the {kind} {name}: only files are read, no addresses") from None
        reason = _refused_size(path) or getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read the {kind} {path}: {reason}") from None
    if not frames:
        raise InputError(f"cannot read the {kind} {path}: no frame in it can be decoded")
    return torch.stack(frames)


def _refused_size(path: Path) -> str | None:
    """What FFmpeg logs of a picture that is too large for it, of a file that cannot be decoded."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as logged, suppress(OSError, ValueError, av.FFmpegError):
            next(_decode(path, fps=None, height=16, width=16), None)
    finally:
        av.logging.set_level(level)
    found = (re.match(r"Picture size (\d+x\d+) is invalid", text) for _, _, text in logged)
    size = next((one[1] for one in found if one), None)
    return size and f"its {size} pixels are too many, at most {_PIXELS:,} are read"


def _decode(path: Path, *, fps: int | None, height: int, width: int) -> Iterator[VideoFrame]:
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    with path.open("rb") as file, av.open(file, "r", options=options) as container:
        if not container.streams.video:
            raise ValueError("there is no picture in it")
        stream, graph = container.streams.video[0], None
        for frame in container.decode(stream):
            if graph is None:
                graph = _graph(frame, stream, fps=fps, height=height, width=width)
            graph.push(frame)
            yield from _pull(graph)
        if graph is not None:
            graph.push(None)
            yield from _pull(graph)


def _graph(first: VideoFrame, stream: av.VideoStream, *, fps: int | None, height: int, width: int) -> Graph:
    """What the released code asks of ffmpeg: upright, at the frame rate, stretched with the bicubic scaler."""
    steps = [_TURNS[first.rotation % 360]] if first.rotation % 360 in _TURNS else []
    if fps is not None:
        steps.append(("fps", str(fps)))
    steps += [("scale", f"{width}:{height}:flags=bicubic"), ("format", "rgb24")]
    graph = Graph()
    source = graph.add_buffer(template=stream, width=first.width, height=first.height, format=first.format)
    graph.link_nodes(source, *(graph.add(*step) for step in steps), graph.add("buffersink")).configure()
    return graph


def _pull(graph: Graph) -> Iterator[VideoFrame]:
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        if isinstance(frame, VideoFrame):
            yield frame

"""Real pictures and clips that a video starts from."""

from __future__ import annotations

import struct
import wave
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import get_args

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

from launch import media
from launch.media import PREFIX_FRAMES, Frame, read_image, read_video
from launch.options import Fit
from launch.output.video import VideoWriter
from models.errors import InputError

RED, BLUE = torch.tensor([224, 0, 0]), torch.tensor([0, 0, 235])


def _near(pixel: Tensor, colour: Tensor) -> bool:
    return bool((pixel.int() - colour).abs().max() <= 6)


def _write(path: Path, frames: Tensor, *, fps: int = 24) -> Path:
    with VideoWriter(path, fps=fps) as writer:
        writer.write(frames)
    return path


def _plain(colour: Tensor, count: int) -> Tensor:
    return colour.to(torch.uint8).expand(count, 64, 64, 3)


def test_an_image_is_stretched_to_the_size(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), tuple(BLUE.tolist()))
    picture.paste(tuple(RED.tolist()), (0, 0, 20, 20))  # the left half
    path = tmp_path / "picture.png"
    picture.save(path)
    frames = read_image(path, Frame(height=64, width=32))
    assert frames.dtype == torch.uint8 and frames.shape == (1, 64, 32, 3)
    for row in (2, 61):
        assert _near(frames[0, row, 2], RED) and _near(frames[0, row, 29], BLUE)


def test_an_image_is_turned_as_its_orientation_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), tuple(BLUE.tolist()))
    picture.paste(tuple(RED.tolist()), (0, 0, 20, 20))
    exif = picture.getexif()
    exif[0x112] = 6  # quantum clockwise: left becomes top
    path = tmp_path / "photo.jpg"
    picture.save(path, exif=exif, quality=95)
    frame = read_image(path, Frame(height=40, width=32))[0]
    assert _near(frame[3, 16], torch.tensor([224, 0, 0])) and _near(frame[36, 16], BLUE)


def test_of_an_animation_only_the_first_frame_is_decoded(tmp_path: Path) -> None:
    """What follows it is cut off and overwritten, and nobody minds."""
    frames = [Image.new("RGB", (64, 64), tuple(colour.tolist())) for colour in (RED, BLUE, RED, BLUE)]
    path = tmp_path / "animation.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40)
    whole = path.read_bytes()
    second = whole.index(b"\x21\xf9", whole.index(b"\x21\xf9") + 1)  # its graphic control extension
    path.write_bytes(whole[:second] + bytes(100_000))
    assert _near(read_image(path, Frame(height=32, width=32))[0, 16, 16], RED)


def test_the_end_of_a_clip_is_read_without_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "clip.mp4", torch.cat([_plain(RED, 900), _plain(BLUE, 20), _plain(RED, 12)]))
    decoded, frames_of = list[object](), media.pulled
    monkeypatch.setattr(media, "pulled", lambda graph: decoded.append(graph) or frames_of(graph))
    frames = read_video(path, Frame(height=32, width=48), fps=24)
    assert [_near(frame[16, 24], BLUE) for frame in frames] == [True] * 20 + [False] * 12
    assert len(decoded) < 600  # from the key frame before it
    whole = read_video(_write(tmp_path / "short.mp4", _plain(BLUE, 14)), Frame(height=32, width=48), fps=24)
    assert len(whole) == 12
    raw = tmp_path / "clip.mjpeg"  # pictures alone: nothing says how long it is
    with av.open(raw, "w", format="mjpeg") as target:
        stream = target.add_stream("mjpeg", rate=25, width=64, height=64, pix_fmt="yuvj420p")
        for colour, count in ((RED, 100), (BLUE, 20), (RED, 12)):
            for frame in _plain(colour, count):
                target.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy())))
        target.mux(stream.encode(None))
    frames = read_video(raw, Frame(height=32, width=48), fps=24)
    assert _near(frames[-1][16, 24], RED) and _near(frames[-16][16, 24], BLUE)


@pytest.mark.parametrize("fit", get_args(Fit))
def test_a_picture_of_another_shape_is_made_to_fit(tmp_path: Path, fit: Fit) -> None:
    picture = Image.new("RGB", (40, 20), tuple(BLUE.tolist()))
    picture.paste(tuple(RED.tolist()), (10, 0, 30, 20))  # the middle
    picture.save(tmp_path / "wide.png")
    frame = read_image(tmp_path / "wide.png", Frame(height=64, width=64, fit=fit))[0]
    assert frame.shape == (64, 64, 3) and _near(frame[32, 32], RED)
    edges = {"stretch": (BLUE, RED), "crop": (RED, RED), "pad": (BLUE, torch.zeros(3))}[fit]
    assert _near(frame[32, 8], edges[0]) and _near(frame[8, 32], edges[1])


def test_a_clip_is_read_from_its_start(tmp_path: Path) -> None:
    path = _write(tmp_path / "clip.mp4", torch.cat([_plain(RED, 24), _plain(BLUE, 24)]))
    frames = read_video(path, Frame(height=32, width=48), fps=24, end="start")
    assert frames.dtype == torch.uint8 and frames.shape == (PREFIX_FRAMES, 32, 48, 3)
    red = [_near(frame[16, 24], RED) for frame in frames]
    assert red == [True] * 24 + [False] * 8
    assert _near(frames[31, 16, 24], BLUE)


@pytest.mark.parametrize(("fps", "frames_of_red"), [(12, 24), (48, 6)])
def test_a_clip_is_resampled_in_time(tmp_path: Path, fps: int, frames_of_red: int) -> None:
    path = _write(tmp_path / "clip.mp4", torch.cat([_plain(RED, 12), _plain(BLUE, 60)]), fps=fps)
    frames = read_video(path, Frame(height=64, width=64), fps=24, end="start")
    assert sum(_near(frame[32, 32], RED) for frame in frames) == frames_of_red


def test_a_short_clip_is_cut_to_whole_latent_frames(tmp_path: Path) -> None:
    path = _write(tmp_path / "clip.mp4", _plain(RED, 14))
    assert len(read_video(path, Frame(height=64, width=64), fps=24)) == 12


def test_a_clip_of_less_than_a_latent_frame_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "clip.mp4", _plain(RED, 3))
    with pytest.raises(InputError, match=r"clip.mp4 has only 3 frames at 24 per second: at least 4 are needed"):
        read_video(path, Frame(height=64, width=64), fps=24)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    text, cut = tmp_path / "notes.png", tmp_path / "cut.mp4"
    text.write_text("no picture\n" * 100)
    whole = _write(tmp_path / "clip.mp4", _plain(RED, 24)).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])  # without its index, which stands at the end
    neither = "it is neither a picture nor a video"
    for path, reason in ((text, neither), (cut, "Invalid data"), (tmp_path / "none.mp4", "No such file")):
        with pytest.raises(InputError, match=rf"cannot read the image .*{path.name}: {reason}"):
            read_image(path, Frame(height=64, width=64))
        with pytest.raises(InputError, match=rf"cannot read the video .*{path.name}: {reason}"):
            read_video(path, Frame(height=64, width=64), fps=24)


def test_files_without_a_picture_are_refused(tmp_path: Path) -> None:
    sound = tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        file.writeframes(bytes(1000))
    with pytest.raises(InputError, match="sound.wav: there is no picture in it"):
        read_video(sound, Frame(height=64, width=64), fps=24)
    text = tmp_path / "notes.txt"
    text.write_text("FFmpeg would draw these words\n" * 100)
    with pytest.raises(InputError, match="notes.txt: it is neither a picture nor a video"):
        read_video(text, Frame(height=64, width=64), fps=24)


def test_a_picture_that_is_too_large_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    path = tmp_path / "large.png"
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(start + struct.pack(">I", 1000) + b"IDAT" + bytes(1000))
    with pytest.raises(InputError, match="large.png: its 20000x20000 pixels are too many, at most 268,435,455 are"):
        read_image(path, Frame(height=64, width=64))


@pytest.fixture
def visits() -> Iterator[tuple[int, list[str]]]:
    """A web server's port, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


def test_no_file_makes_us_open_another(tmp_path: Path, visits: tuple[int, list[str]]) -> None:
    """Neither an address, nor a playlist, nor a script that lists files, local ones or on the network."""
    port, asked = visits
    clip, web = _write(tmp_path / "clip.mp4", _plain(RED, 24)), f"http://127.0.0.1:{port}"
    scripts = {
        "list.ffconcat": f"ffconcat version 1.0\nfile {clip.name}\n",
        "web.ffconcat": f"ffconcat version 1.0\nfile {web}/a.mp4\n",
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{web}/b.ts\n#EXT-X-ENDLIST\n",
        "list.sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "list.mpd": f'<?xml version="1.0"?><MPD><BaseURL>{web}/</BaseURL></MPD>',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=rf"{name}: (it is neither a picture nor a video|Invalid data)"):
            read_video(tmp_path / name, Frame(height=64, width=64), fps=24)
    with pytest.raises(InputError, match=f"the image {web}/c.mp4: only files are read, no addresses"):
        read_image(Path(f"{web}/c.mp4"), Frame(height=64, width=64))
    for address in (f"concat:{clip}|{clip}", f"file:{clip}", f"subfile,,start,0,end,0,,:{clip}"):
        with pytest.raises(InputError, match="No such file"):
            read_image(Path(address), Frame(height=64, width=64))
    assert asked == []

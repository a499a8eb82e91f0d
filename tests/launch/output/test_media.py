"""Real pictures and clips, read and written; nothing is left of a file that was not finished."""

from __future__ import annotations

import os
import threading
import wave
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.files import part_of
from launch.output.media import PREFIX_FRAMES, BackgroundWriter, VideoWriter, read_image, read_video
from models.errors import InputError

RED, BLUE = torch.tensor([224, 0, 0]), torch.tensor([0, 0, 235])


def _near(pixel: Tensor, colour: Tensor) -> bool:
    return bool((pixel.int() - colour).abs().max() <= 6)


def _write(path: Path, frames: Tensor, *, fps: int = 24) -> Path:
    with VideoWriter(path, fps=fps, height=frames.shape[1], width=frames.shape[2]) as writer:
        writer.write(frames)
    return path


def _plain(colour: Tensor, count: int) -> Tensor:
    return colour.to(torch.uint8).expand(count, 64, 64, 3)


def test_an_image_is_stretched_to_the_size(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), tuple(BLUE.tolist()))
    picture.paste(tuple(RED.tolist()), (0, 0, 20, 20))  # the left half
    path = tmp_path / "picture.png"
    picture.save(path)
    frames = read_image(path, height=64, width=32)
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
    frame = read_image(path, height=40, width=32)[0]
    assert _near(frame[3, 16], torch.tensor([224, 0, 0])) and _near(frame[36, 16], BLUE)


def test_of_an_animation_only_the_first_frame_is_decoded(tmp_path: Path) -> None:
    """What follows it is cut off and overwritten, and nobody minds."""
    frames = [Image.new("RGB", (64, 64), tuple(colour.tolist())) for colour in (RED, BLUE, RED, BLUE)]
    path = tmp_path / "animation.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40)
    whole = path.read_bytes()
    second = whole.index(b"\x21\xf9", whole.index(b"\x21\xf9") + 1)  # its graphic control extension
    path.write_bytes(whole[:second] + bytes(100_000))
    assert _near(read_image(path, height=32, width=32)[0, 16, 16], RED)


def test_a_clip_is_read_from_its_start(tmp_path: Path) -> None:
    path = _write(tmp_path / "clip.mp4", torch.cat([_plain(RED, 24), _plain(BLUE, 24)]))
    frames = read_video(path, fps=24, height=32, width=48)
    assert frames.dtype == torch.uint8 and frames.shape == (PREFIX_FRAMES, 32, 48, 3)
    red = [_near(frame[16, 24], RED) for frame in frames]
    assert red == [True] * 24 + [False] * 8
    assert _near(frames[31, 16, 24], BLUE)


@pytest.mark.parametrize(("fps", "frames_of_red"), [(12, 24), (48, 6)])
def test_a_clip_is_resampled_in_time(tmp_path: Path, fps: int, frames_of_red: int) -> None:
    path = _write(tmp_path / "clip.mp4", torch.cat([_plain(RED, 12), _plain(BLUE, 60)]), fps=fps)
    frames = read_video(path, fps=24, height=64, width=64)
    assert sum(_near(frame[32, 32], RED) for frame in frames) == frames_of_red


def test_a_short_clip_is_cut_to_whole_latent_frames(tmp_path: Path) -> None:
    path = _write(tmp_path / "clip.mp4", _plain(RED, 14))
    assert len(read_video(path, fps=24, height=64, width=64)) == 12


def test_a_clip_of_less_than_a_latent_frame_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "clip.mp4", _plain(RED, 3))
    with pytest.raises(InputError, match=r"clip.mp4 has only 3 frames at 24 per second: at least 4 are needed"):
        read_video(path, fps=24, height=64, width=64)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    text, cut = tmp_path / "notes.png", tmp_path / "cut.mp4"
    text.write_text("no picture\n" * 100)
    whole = _write(tmp_path / "clip.mp4", _plain(RED, 24)).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])  # without its index, which stands at the end
    for path, reason in ((text, "Invalid data"), (cut, "Invalid data"), (tmp_path / "none.mp4", "No such file")):
        with pytest.raises(InputError, match=rf"cannot read the image .*{path.name}: {reason}"):
            read_image(path, height=64, width=64)
        with pytest.raises(InputError, match=rf"cannot read the video .*{path.name}: {reason}"):
            read_video(path, fps=24, height=64, width=64)


def test_files_without_a_picture_are_refused(tmp_path: Path) -> None:
    sound, text = tmp_path / "sound.wav", tmp_path / "notes.txt"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        file.writeframes(bytes(1000))
    text.write_text("FFmpeg would draw these words\n" * 100)
    for path in (sound, text):
        with pytest.raises(InputError, match=rf"{path.name}: there is no picture in it"):
            read_video(path, fps=24, height=64, width=64)


# ---- writing


COLOURS = torch.tensor([[224, 33, 33], [31, 189, 51], [38, 64, 235], [237, 219, 36], [31, 209, 219], [128, 128, 128]])


def _writer(path: Path) -> VideoWriter:
    return VideoWriter(path, fps=24, height=64, width=96)


def _bars(count: int) -> Tensor:
    """Six bars of colour, 16 pixels wide."""
    row = COLOURS.to(torch.uint8).repeat_interleave(16, dim=0)
    return row.expand(count, 64, 96, 3)


def _noise(count: int) -> Tensor:
    return torch.randint(256, (count, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _link_to_full_disk(path: Path) -> None:
    """Make the hidden file one that every write to fails with "no space left on device"."""
    part_of(path).symlink_to("/dev/full")


def test_a_video_reads_back_with_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "bars.mp4"
    with _writer(path) as writer:
        writer.write(_bars(10))
        writer.write(_bars(14))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 24)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 24
    for frame in (frames[0], frames[-1]):
        assert frame.shape == (64, 96, 3)
        assert abs(frame[32, 8::16].astype(int) - COLOURS.numpy()).max() <= 6
    assert os.listdir(tmp_path) == ["bars.mp4"]


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    wave = torch.arange(24 * 64 * 96 * 3).reshape(24, 64, 96, 3) / 997
    frames = (128 + 100 * wave.sin()).to(torch.uint8)
    files = set()
    for number in range(5):
        path = tmp_path / f"{number}.mp4"
        with _writer(path) as writer:
            writer.write(frames)
        files.add(path.read_bytes())
    assert len(files) == 1


def test_a_video_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "late.mp4"
    path.write_bytes(b"the older one")
    with _writer(path) as writer:
        writer.write(_noise(60))
        assert path.read_bytes() == b"the older one"
        hidden = [name for name in os.listdir(tmp_path) if name != "late.mp4"]
        assert len(hidden) == 1 and hidden[0].startswith(".")
    assert path.read_bytes() != b"the older one"


@pytest.mark.parametrize("background", [False, True])
def test_an_error_leaves_nothing_behind(tmp_path: Path, background: bool) -> None:
    writer = _writer(tmp_path / "broken.mp4")
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(writer) if background else writer as sink:
        sink.write(_noise(10))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "full.mp4"
    _link_to_full_disk(path)
    writer = _writer(path)
    with (
        pytest.raises(InputError, match=r"cannot write .*full.mp4: no space left there"),
        BackgroundWriter(writer) if background else writer as sink,
    ):
        for _ in range(20):
            sink.write(_noise(10))
    assert os.listdir(tmp_path) == []


def test_background_frames_are_all_there_in_order(tmp_path: Path) -> None:
    path = tmp_path / "grey.mp4"
    with BackgroundWriter(_writer(path), depth=1) as writer:
        for level in range(0, 240, 10):
            writer.write(torch.full((2, 64, 96, 3), level, dtype=torch.uint8))
    with av.open(str(path)) as container:
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert levels == pytest.approx([level for level in range(0, 240, 10) for _ in range(2)], abs=3)


def test_no_thread_outlives_the_writer(tmp_path: Path) -> None:
    with BackgroundWriter(_writer(tmp_path / "short.mp4")) as writer:
        writer.write(_bars(1))
        assert any(thread.name.startswith("video") for thread in threading.enumerate())
    assert not any(thread.name.startswith("video") for thread in threading.enumerate())

"""Videos that are watched while they are made: the growing file and standard output, as real processes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from launch.api import load
from launch.cli import run
from launch.output.formats import MP4
from launch.output.segments import encode_segment
from tests.launch.process import environment, flowcache_process

PROMPT = "a red circle moving right"
CHUNKS = 9


def frames_of(file: Path | io.BytesIO) -> NDArray[np.uint8]:
    with av.open(str(file) if isinstance(file, Path) else file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def arguments(random_weights: Path) -> list[object]:
    return ["generate", PROMPT, "--chunks", CHUNKS, "--steps", 8, "--weights", random_weights, "--threads", 1]


@pytest.fixture
def reading(tmp_path: Path, arguments: list[object]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes a video to a pipe, which holds so little that the process is never far ahead."""
    command = [sys.executable, "-m", "launch", *map(str, arguments), "--out", "-"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), pipesize=4096, **pipes)
    yield process
    process.kill()
    process.communicate()


def _read_frames(process: subprocess.Popen[bytes]) -> bytes:
    """What a process writes until frames of it can be decoded."""
    data = b""
    assert process.stdout is not None
    while True:
        more = os.read(process.stdout.fileno(), 65_536)
        assert more, "the stream has ended"
        data += more
        try:
            if len(frames_of(io.BytesIO(data))):
                return data
        except (av.FFmpegError, ValueError):
            pass


@pytest.mark.slow
def test_a_growing_file_and_a_stream_play_before_a_third_is_made(
    tmp_path: Path, arguments: list[object], reading: subprocess.Popen[bytes], random_weights: Path
) -> None:
    data = _read_frames(reading)
    assert len(frames_of(io.BytesIO(data))) <= CHUNKS * 24 / 3
    rest, errors = reading.communicate(timeout=120)
    said = errors.decode()
    assert reading.returncode == 0 and f"standard output: {CHUNKS * 24} frames of 64x64" in said
    assert f"chunks {CHUNKS}/{CHUNKS}" in said and os.listdir(tmp_path) == []
    process = flowcache_process(tmp_path, *arguments, "--out", "a.mp4", "--preview")
    partial, deadline = tmp_path / "a.partial.mp4", time.monotonic() + 90
    while not (partial.exists() and partial.stat().st_size > 1000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    assert 24 <= len(frames_of(partial)) <= CHUNKS * 24 / 3 and not (tmp_path / "a.mp4").exists()
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "a.png"]
    assert (frames_of(io.BytesIO(data + rest)) == frames_of(tmp_path / "a.mp4")).all()
    with load(weights=random_weights, threads=1) as engine:  # without a stream
        made = [
            encode_segment(chunk.frames, MP4.codec, 24) for chunk in engine.generate(PROMPT, chunks=CHUNKS, steps=8)
        ]
    assert (np.concatenate([frames_of(io.BytesIO(one)) for one in made]) == frames_of(tmp_path / "a.mp4")).all()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_a_reader_that_goes_or_stops_ends_the_run(tmp_path: Path, reading: subprocess.Popen[bytes]) -> None:
    _read_frames(reading)
    assert reading.stdout is not None and reading.stderr is not None
    reading.stdout.close()
    errors = reading.stderr.read().decode()
    assert reading.wait(30) == 3
    assert errors.splitlines()[-1] == "flowcache: error: cannot write the video to standard output: Broken pipe"
    assert errors.count("error") == 1 and os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_a_signal_ends_a_run_whose_reader_has_stopped(tmp_path: Path, random_weights: Path) -> None:
    """The pipe is full, and nobody reads it."""
    options = ["--chunks", 500, "--steps", 4, "--weights", str(random_weights), "--threads", 1, "--out", "-"]
    command = [sys.executable, "-m", "launch", "generate", PROMPT, *map(str, options)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        time.sleep(8)
        process.terminate()
        errors = process.stderr.read().decode()
        assert process.wait(20) == 143 and errors.splitlines()[-1] == "flowcache: stopped"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_ranks_stream_too(arguments: list[object], capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run([*map(str, arguments), "--chunks", "2", "--pp", "2", "--out", "-"]) == 0
    shown, said = capfdbinary.readouterr()
    assert len(frames_of(io.BytesIO(shown))) == 48 and b"standard output: 48 frames" in said

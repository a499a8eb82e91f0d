"""The command line as a process of its own."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from safetensors.torch import load_file, save_file

from engine.files import partial_of

ROOT = Path(__file__).parents[2]
Result = subprocess.CompletedProcess[str]


def environment() -> dict[str, str]:
    """One thread, and the packages found from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def overflowing_weights(folder: Path, name: str, column: slice = slice(None)) -> Path:
    """Magi-pocket's weights in a new folder, a matrix of which is finite and too large: some columns, or all of it."""
    shutil.copytree(ROOT / "models" / "pocket" / "weights", folder)
    path = folder / "inference_weight.distill" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].float()
    tensors[name][:, column] *= 1e38
    save_file(tensors, path)
    return folder


@contextmanager
def short_files(most: int = 1000) -> Iterator[None]:
    """Nothing may grow beyond so many bytes; the system says it as it says that a disk is full.

    Not a fixture: the limit holds for the process, and pytest writes to its log before a fixture ends.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[], object]]:
    """The folder is a disk of its own of that size, and what is given makes it larger; without root it is skipped."""
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, f"size={size}", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("a full disk is a small tmpfs here, which only root may mount")
    try:
        yield lambda: subprocess.run([*mount, "remount,size=64m", "tmpfs", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def wait_for_frames(process: subprocess.Popen[str], path: Path, seconds: float = 90) -> None:
    """Wait until a process has written frames of a video, beside `path`."""
    deadline, partial = time.monotonic() + seconds, partial_of(path)
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, "no frame was written"
        time.sleep(0.01)


def flowcache_process(
    folder: Path,
    *arguments: object,
    extra: Mapping[str, str] | None = None,
    output: int | TextIO = subprocess.PIPE,
    errors: int | TextIO = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start `python -m launch ...`.

    Args:
        folder: where it stands.
        arguments: of the command line.
        extra: variables of the environment.
        output: standard output.
        errors: standard error.
    """

    def prepare() -> None:
        # A test run in the background may have been started with signals ignored, and children inherit that.
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "launch", *map(str, arguments)],
        cwd=folder,
        env={**environment(), **(extra or {})},
        stdout=output,
        stderr=errors,
        text=True,
        preexec_fn=prepare,
    )


def command_of(pid: int) -> str:
    """How a process was started; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short name, for Ray's sockets, until the end."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="t"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

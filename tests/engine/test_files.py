"""Targets that are checked before the work: refused with a reason, or accepted without a trace."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.files import atomic_write, check_folder, check_target, part_of
from engine.machine import this_machine
from models.errors import InputError


def test_a_good_target_leaves_no_trace(tmp_path: Path) -> None:
    check_target(tmp_path / "good.mp4", suffix=".mp4", what="video")
    assert os.listdir(tmp_path) == []


def test_bad_targets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "taken.mp4").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "video.gif", "the name of the video must end in .mp4"),
        (tmp_path / "missing" / "video.mp4", "the folder .*missing does not exist"),
        (tmp_path / "file" / "video.mp4", "is not a folder"),
        (tmp_path / "taken.mp4", "not a file"),
        (tmp_path / f"{'long' * 100}.mp4", "name too long"),
        (Path("/proc/video.mp4"), "cannot write /proc/video.mp4: "),  # where not even root may write
    ):
        with pytest.raises(InputError, match=reason):
            check_target(path, suffix=".mp4", what="video")


@pytest.mark.parametrize("name", ["new", "new/inner", "there", "there/inner", "."])
def test_a_good_folder_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    check_folder(Path(name))
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == []


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "file", "file is not a folder"),
        (tmp_path / "file" / "inner", "is not a folder"),
        (tmp_path / ("long" * 100), "name too long"),
        (Path("/proc/run"), "cannot write /proc/run: "),
    ):
        with pytest.raises(InputError, match=reason):
            check_folder(path)


def test_what_killed_processes_have_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    own = part_of(tmp_path / "old.mp4")
    stale, other = (
        own.with_name(own.name.replace(f"{os.getpid()}.", f"{pid}.")) for pid in (process.pid, os.getppid())
    )
    for path in (stale, other):
        path.write_bytes(b"x")
    check_target(tmp_path / "good.mp4", suffix=".mp4", what="video")
    assert os.listdir(tmp_path) == [other.name]
    (stale / "below").mkdir(parents=True)
    check_folder(tmp_path)
    assert os.listdir(tmp_path) == [other.name]


def test_what_another_machine_writes_into_a_shared_folder_stays(tmp_path: Path) -> None:
    """Its process has a number that nobody has here."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    code = (
        "import os, socket, sys, pathlib, engine.files\n"
        "os.getpid, socket.gethostname = lambda: int(sys.argv[1]), lambda: 'another'\n"
        "engine.files.part_of(pathlib.Path(sys.argv[2])).write_bytes(b'x')"
    )
    command = [sys.executable, "-c", code, str(process.pid), str(tmp_path / "film.mp4")]
    subprocess.run(command, check=True)
    (theirs,) = os.listdir(tmp_path)
    assert len(theirs) < len(".film.mp4.part") + 20 and re.fullmatch(r"[\w.-]+", theirs)
    check_target(tmp_path / "good.mp4", suffix=".mp4", what="video")
    check_folder(tmp_path)
    assert os.listdir(tmp_path) == [theirs]


@pytest.mark.parametrize("length", [199, 200, 201, 232, 254, 255, 256])
def test_a_long_name_works_or_is_refused_before_the_work(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("n" * (length - 4) + ".mp4")
    try:
        check_target(path, suffix=".mp4", what="video")
    except InputError as error:
        assert length > 255 and "name too long" in str(error) and "\n" not in str(error)
    else:
        with atomic_write(path) as file:
            file.write(b"x")
        assert os.listdir(tmp_path) == [path.name]


def test_this_machine_has_one_name() -> None:
    command = [sys.executable, "-c", "from engine.machine import this_machine; print(this_machine())"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == this_machine()

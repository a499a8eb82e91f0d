"""Targets that are checked before the work: refused with a reason, or accepted without a trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.files import check_folder, check_target
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
    stale, other = tmp_path / f".old.mp4.{process.pid}.part", tmp_path / f".new.mp4.{os.getppid()}.part"
    for path in (stale, other):
        path.write_bytes(b"x")
    check_target(tmp_path / "good.mp4", suffix=".mp4", what="video")
    assert os.listdir(tmp_path) == [other.name]
    stale.write_bytes(b"x")
    check_folder(tmp_path)
    assert os.listdir(tmp_path) == [other.name]

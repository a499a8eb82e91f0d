"""Videos of the current folder that are made, killed in the making, and made by the same command to their end."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

from launch.cli import run
from tests.launch.process import flowcache_process

PROMPT, OTHER = "a red circle moving right", "a blue cross moving up"


def generate(*arguments: object) -> None:
    """Make a video in this process."""
    assert run(["generate", PROMPT, *map(str, arguments)]) == 0


def killed_and_going_on(folder: Path, options: Sequence[str], how: Sequence[str], times: int) -> None:
    """The frames are those of a run that nobody has killed, and the state is that of the whole video."""
    began = time.monotonic()
    generate(*options, "--chunks", 12, "--out", "whole.mp4")
    latest, moments = 2 * (time.monotonic() - began), random.Random(str(how))
    command = ["generate", PROMPT, *options, *how, "--chunks", "12", "--out", "a.mp4", "--checkpoint", "kept"]
    command += ["--checkpoint-every", "1", "--keep-state"]
    for _ in range(times):
        process = flowcache_process(folder, *command)
        count = len(_manifests())
        while len(_manifests()) == count < 2 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, latest / 3))
        process.kill()
        process.communicate()
        assert not Path("a.mp4").exists() or Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    time.sleep(1 if how else 0)  # ranks see that the first one is gone
    process = flowcache_process(folder, *command)
    _, said = process.communicate(timeout=170)
    assert process.returncode == 0, said
    assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert sorted(os.listdir()) == ["a.mp4", "kept", "whole.mp4"]
    (state,) = Path("kept").iterdir()
    assert json.loads((state / "video.json").read_text())["options"]["chunks"] == 12


def _manifests() -> list[Path]:
    return list(Path("kept").glob("*/pp*/*/manifest.json"))

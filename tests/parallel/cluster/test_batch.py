"""`flowcache batch` as a process of its own, which starts a cluster by itself; also killed and started again."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from launch.batch.folder import ChunkFiles
from launch.generate import generate
from launch.options import Options
from tests.launch.process import flowcache_process
from tests.parallel.strangers import Fuzzer

pytestmark = pytest.mark.slow
PROMPTS = ["a red circle moving right", "a blue cross moving up"]


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def children(pid):
    """All processes that descend from one."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, look = set(), [pid]
    while look:
        below = parents.get(look.pop(), [])
        found |= set(below)
        look += below
    return found


def test_a_killed_batch_goes_on_where_it_was(tmp_path):
    write(tmp_path / "prompts.jsonl", *({"prompt": prompt, "chunks": 4} for prompt in PROMPTS), "{broken")
    command = ["batch", "prompts.jsonl", "--out", "videos", "--pp", "2", "--steps", "8", "--height", "64"]
    command += ["--width", "64", "--checkpoint-every", "1", "--cache", "none", "--concurrency", "2"]
    first = flowcache_process(tmp_path, *command)
    deadline = time.monotonic() + 90
    try:
        while not list((tmp_path / "videos").glob(".*.parts/000001.npy")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        below = children(first.pid)
    finally:
        first.send_signal(signal.SIGKILL)
        _, text = first.communicate()
    assert any("RankActor" in _command(pid) for pid in below), text
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").glob(".*.parts/*.npy")}
    deadline = time.monotonic() + 20
    while left := [pid for pid in below if _command(pid) and "Agent" not in _command(pid)]:  # Ray's own take longer
        assert time.monotonic() < deadline, [_command(pid) for pid in left]
        time.sleep(0.2)
    second = flowcache_process(tmp_path, *command)
    _, text = second.communicate(timeout=120)
    assert second.returncode == 1, text  # of the broken line
    assert "prompts.jsonl line 3: this is not JSON" in text and "2 done" in text
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert len(videos) == 2 and parts
    assert not list((tmp_path / "videos").glob(".*.parts"))
    results = [json.loads(line) for line in (tmp_path / "videos" / "results.jsonl").read_text().splitlines()]
    assert {result["status"] for result in results} == {"done"} and {result["chunks"] for result in results} == {4}
    made = {path: path.stat().st_mtime_ns for path in videos}
    third = flowcache_process(tmp_path, *command)
    _, text = third.communicate(timeout=60)
    assert third.returncode == 1 and "2 there already" in text
    assert {path: path.stat().st_mtime_ns for path in videos} == made


def _command(pid):
    """How a process was started; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def test_a_batch_joins_the_cluster_that_it_is_told_of(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    write(tmp_path / "prompts.jsonl", {"prompt": PROMPTS[0], "chunks": 1})
    size = ["--steps", "8", "--height", "64", "--width", "64"]
    wide = flowcache_process(tmp_path, "batch", "prompts.jsonl", "--threads", "99", *size)
    _, text = wide.communicate(timeout=60)
    assert wide.returncode == 2 and "1 gang of --pp 1 x --cp 1 needs 99 CPUs; the cluster has" in text
    made = flowcache_process(tmp_path, "batch", "prompts.jsonl", *size)
    _, text = made.communicate(timeout=90)
    assert made.returncode == 0, text
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1


def test_a_video_on_ray_is_that_of_one_process_whatever_strangers_send(tmp_path, monkeypatch):
    """Somebody sends garbage to all ports of the command and its ranks; with Ray's they are at the loopback address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    options = Options(prompts=[PROMPTS[0]], out=Path("a.mp4"), chunks=2, steps=8, height=64, width=64, threads=1)
    size = ["--chunks", 2, "--steps", 8, "--height", 64, "--width", 64, "--threads", 1]
    made = flowcache_process(tmp_path, "generate", PROMPTS[0], "--pp", 2, "--launcher", "ray", "--out", "b.mp4", *size)
    fuzzer = Fuzzer(made.pid, spares=lambda pid: pid != made.pid and "RankActor" not in _command(pid))
    text, errors = made.communicate(timeout=120)
    assert fuzzer.stop() == {"127.0.0.1"} and len(fuzzer.ports) >= 4
    assert made.returncode == 0, errors
    assert "b.mp4: 48 frames of 64x64" in text
    generate(options, [])
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 2 MB, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=2m", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("a full disk is a small tmpfs here, which only root may mount")
    try:
        yield folder, lambda: subprocess.run([*mount, "remount,size=64m", "tmpfs", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_a_batch_with_one_line_and_the_next_run_goes_on_with_another_layout(
    tmp_path, small_disk, monkeypatch
):
    disk, enlarge = small_disk
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", {"prompt": PROMPTS[0], "chunks": 6})
    command = ["batch", "prompts.jsonl", "--out", disk / "videos", "--steps", 8, "--threads", 1]
    command += ["--checkpoint-every", 1]
    full = flowcache_process(tmp_path, *command)
    _, text = full.communicate(timeout=90)
    assert full.returncode == 2, text
    assert re.search(r"error: cannot write .*\.checkpoints/.*: no space left there, \d\.\d MB are free", text), text
    assert "was lost" not in text and "Traceback" not in text
    enlarge()
    again = flowcache_process(tmp_path, *command, "--pp", 2)
    _, text = again.communicate(timeout=90)
    assert again.returncode == 0, text
    assert "computed again from its first chunk on" in text
    [video] = (disk / "videos").glob("*.mp4")
    assert {path.name for path in (disk / "videos").iterdir()} == {video.name, "results.jsonl"}
    generate(Options(prompts=PROMPTS[:1], out=Path("a.mp4"), chunks=6, steps=8, threads=1), [])
    assert video.read_bytes() == Path("a.mp4").read_bytes()


def test_a_file_of_bad_lines_only_is_bad_input(tmp_path):
    write(tmp_path / "prompts.jsonl", "{broken", {"prompt": "a red circle moving right", "chunks": 0})
    process = flowcache_process(tmp_path, "batch", "prompts.jsonl")
    _, text = process.communicate(timeout=60)
    assert process.returncode == 2 and "line 1" in text and "line 2" in text


def test_chunks_count_from_the_first_on_and_only_whole_ones(tmp_path):
    files = ChunkFiles(folder=tmp_path / "parts")
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    for index in (0, 1, 3):
        files.write(index, frames)
    assert files.count() == 2
    os.truncate(tmp_path / "parts" / "000001.npy", 140)
    assert files.count() == 1

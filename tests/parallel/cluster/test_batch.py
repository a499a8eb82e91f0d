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

from launch.generate import generate
from launch.options import Options
from models.pocket.text import VOCABULARY
from tests.launch.process import flowcache_process, overflowing_weights

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


def test_a_killed_batch_goes_on_where_it_was(tmp_path, monkeypatch):
    """Also with a chunk of one video and a checkpoint of the other damaged: both are made again."""
    write(tmp_path / "prompts.jsonl", *({"prompt": prompt, "chunks": 4} for prompt in PROMPTS), "{broken")
    command = ["batch", "prompts.jsonl", "--out", "videos", "--pp", "2", "--steps", "8", "--height", "64"]
    command += ["--width", "64", "--checkpoint-every", "1", "--cache", "none", "--concurrency", "2"]
    first = flowcache_process(tmp_path, *command)
    deadline = time.monotonic() + 90
    try:
        while len(list(tmp_path.glob("videos/.*.parts/000000.npy"))) < 2 or len(kept(tmp_path)) < 2:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        below = children(first.pid)
    finally:
        first.send_signal(signal.SIGKILL)
        _, text = first.communicate()
    assert any("RankActor" in _command(pid) for pid in below), text
    wholes = kept(tmp_path)
    digest = wholes[0].relative_to(tmp_path / "videos" / ".checkpoints").parts[0]
    part, shard = tmp_path / "videos" / f".{digest}.parts" / "000000.npy", wholes[1].parent / "rank-1.safetensors"
    np.savez(part.with_suffix(""), frames=np.zeros((24, 64, 64, 3), np.uint8))
    part.with_suffix(".npz").replace(part)
    with shard.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(bytes(4000))
    deadline = time.monotonic() + 20
    while left := [pid for pid in below if _command(pid) and "Agent" not in _command(pid)]:  # Ray's own take longer
        assert time.monotonic() < deadline, [_command(pid) for pid in left]
        time.sleep(0.2)
    second = flowcache_process(tmp_path, *command)
    _, text = second.communicate(timeout=120)
    assert second.returncode == 1, text  # of the broken line
    assert "prompts.jsonl line 3: this is not JSON" in text and "2 done" in text
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert len(videos) == 2
    for damaged in (part.relative_to(tmp_path), shard):
        assert f"{damaged} does not match its checksum; " in text
    assert not list((tmp_path / "videos").glob(".*.parts"))
    results = [json.loads(line) for line in (tmp_path / "videos" / "results.jsonl").read_text().splitlines()]
    assert {result["status"] for result in results} == {"done"} and {result["chunks"] for result in results} == {4}
    monkeypatch.chdir(tmp_path)
    for prompt, path in zip(PROMPTS, videos, strict=True):
        size = {"chunks": 4, "steps": 8, "height": 64, "width": 64, "cache": "none", "threads": 1}
        generate(Options(prompts=[prompt], out=Path("alone.mp4"), **size), [])
        assert path.read_bytes() == Path("alone.mp4").read_bytes()
    made = {path: path.stat().st_mtime_ns for path in videos}
    third = flowcache_process(tmp_path, *command)
    _, text = third.communicate(timeout=60)
    assert third.returncode == 1 and "2 there already" in text
    assert {path: path.stat().st_mtime_ns for path in videos} == made


def kept(folder):
    """The manifest of a checkpoint of each video that has one."""
    found = sorted(folder.glob("videos/.checkpoints/**/manifest.json"))
    return list({path.relative_to(folder / "videos" / ".checkpoints").parts[0]: path for path in found}.values())


def _command(pid):
    """How a process was started; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def test_a_batch_joins_the_cluster_that_it_is_told_of(cluster, tmp_path, monkeypatch):
    """With weights that one word of a prompt makes overflow: that video is reported, and the other one made."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    word = VOCABULARY.index("blue")
    weights = overflowing_weights(tmp_path / "weights", "y_embedder.y_proj_xattn.0.weight", slice(word, word + 1))
    write(tmp_path / "prompts.jsonl", *({"prompt": prompt, "chunks": 1} for prompt in reversed(PROMPTS)))
    size = ["--steps", "8", "--height", "64", "--width", "64", "--weights", weights, "--pp", "2"]
    wide = flowcache_process(tmp_path, "batch", "prompts.jsonl", "--threads", "99", *size)
    _, text = wide.communicate(timeout=60)
    assert wide.returncode == 2 and "1 gang of --pp 2 x --cp 1 needs 198 CPUs; the cluster has" in text
    made = flowcache_process(tmp_path, "batch", "prompts.jsonl", *size)
    _, text = made.communicate(timeout=90)
    assert made.returncode == 1, text
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    lines = (tmp_path / "videos" / "results.jsonl").read_text().splitlines()
    found = {one["prompt"]: one for one in map(json.loads, lines)}
    assert [found[prompt]["status"] for prompt in PROMPTS] == ["done", "failed"]
    assert "rank 0 has computed NaN or infinity at tick 0, chunk 0: " in found[PROMPTS[1]]["error"]
    assert "was lost" not in text


def test_a_video_on_ray_is_that_of_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Options(prompts=[PROMPTS[0]], out=Path("a.mp4"), chunks=2, steps=8, height=64, width=64, threads=1)
    size = ["--chunks", 2, "--steps", 8, "--height", 64, "--width", 64, "--threads", 1]
    made = flowcache_process(tmp_path, "generate", PROMPTS[0], "--pp", 2, "--launcher", "ray", "--out", "b.mp4", *size)
    text, errors = made.communicate(timeout=120)
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

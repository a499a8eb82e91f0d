"""`flowcache batch` as a process of its own, which starts a cluster by itself; also killed and started again."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from launch.cli import run
from launch.generate import generate
from launch.options import Options
from parallel.health.processes import descendants
from tests.launch.process import command_of, flowcache_process, short_folder, small_disk
from tests.parallel.forked import ray_workers
from tests.parallel.strangers import Fuzzer

pytestmark = pytest.mark.slow
PROMPTS = ["a red circle moving right", "a blue cross moving up"]


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


@pytest.fixture
def temporary():
    with short_folder() as folder:
        yield folder


class Runs:
    """One command, started again and again."""

    def __init__(self, folder, temporary, *command):
        self.folder, self.temporary, self.command = folder, temporary, command
        self.videos = folder / "videos"

    def start(self):
        self.process = flowcache_process(self.folder, *self.command, extra={"TMPDIR": str(self.temporary)})

    def when(self, condition):
        """What a condition gives as soon as that is true."""
        deadline = time.monotonic() + 180
        while not (found := condition()):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found

    def below(self, name, but=()):
        return [pid for pid in descendants(self.process.pid) if name in command_of(pid) and pid not in but]

    def end(self, seconds=180):
        out, text = self.process.communicate(timeout=seconds)
        assert out == "" and "Traceback" not in text
        return self.process.returncode, text

    def lose_the_command(self):
        self.start()
        try:
            self.when(lambda: len(self.parts()) == len(self.wholes()) == 2)
            below = self.below("")
            assert any("RankActor" in command_of(pid) for pid in below)
        finally:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
        deadline = time.monotonic() + 60
        while left := [
            pid for pid in below if command_of(pid) and "Agent" not in command_of(pid)
        ]:  # Ray's own take longer
            assert time.monotonic() < deadline, [command_of(pid) for pid in left]
            time.sleep(0.2)
        assert list(self.temporary.glob(".r*"))

    def parts(self):
        """The first chunk of each video that has one."""
        return sorted(self.videos.glob(".checkpoints/*/segments-*/000000.mp4"))

    def chunks(self):
        """How many chunks of all videos there are."""
        return len(list(self.videos.glob(".checkpoints/*/segments-*/*.mp4")))

    def wholes(self):
        """The last whole checkpoint of each video that has one, by the video's digest."""
        found = sorted(self.videos.glob(".checkpoints/*/pp2/*/manifest.json"))
        return {path.parts[-4]: path.parent for path in found}

    def damage(self):
        """A chunk of one video, which is overwritten, and a file of the last checkpoint of the other."""
        part = self.parts()[0]
        shard = next(path for digest, path in self.wholes().items() if digest not in str(part)) / "rank-1.safetensors"
        part.write_bytes(part.read_bytes()[::-1])
        with shard.open("r+b") as file:
            file.seek(-5000, os.SEEK_END)
            file.write(bytes(4000))
        return part, shard

    def lose_a_rank_and_the_head(self):
        before = self.chunks()
        self.start()
        # A gang that cannot say why a rank died before it was ready tries again in silence, so it is ready first.
        self.when(lambda: self.chunks() > before)
        ranks = self.below("RankActor")
        os.kill(ranks[0], signal.SIGKILL)
        self.when(lambda: len(self.below("RankActor.run", but=ranks)) == 2)
        below = self.below("")
        os.kill(self.below("gcs_server")[0], signal.SIGKILL)
        status, text = self.end()
        last = text.splitlines()[-1]
        assert status == 1 and last.startswith("flowcache: error: the head of the Ray cluster (its GCS) is gone"), text
        assert "gang-0 was lost" in text
        assert "raylet" in Path(re.search("what Ray said is in (.*)", text)[1]).read_text()
        assert not [command_of(pid) for pid in below if command_of(pid)]
        assert [path.suffix for path in self.temporary.iterdir()] == [".log"]


def test_a_batch_that_was_ended_goes_on_where_it_was(tmp_path, temporary, monkeypatch):
    """Also with a chunk of one video and a checkpoint of the other damaged: both are made again."""
    write(tmp_path / "prompts.jsonl", *({"prompt": prompt, "chunks": 8} for prompt in PROMPTS), "{broken")
    command = ["batch", "prompts.jsonl", "--out", "videos", "--pp", "2", "--steps", "8", "--height", "64"]
    command += ["--width", "64", "--checkpoint-every", "1", "--cache", "none", "--concurrency", "2"]
    runs, videos = Runs(tmp_path, temporary, *command), tmp_path / "videos"
    runs.lose_the_command()
    runs.lose_a_rank_and_the_head()
    damaged = runs.damage()
    runs.start()
    status, text = runs.end()
    assert status == 1, text  # of the broken line
    assert "prompts.jsonl line 3: this is not JSON" in text and "2 done" in text
    assert all(f"{path} is damaged: it does not match its checksum; " in text for path in damaged), text
    made = {path: path.stat().st_mtime_ns for path in videos.glob("*.mp4")}
    assert len(made) == 2
    assert {path.name for path in videos.iterdir()} == {"results.jsonl", *(path.name for path in made)}
    results = [json.loads(line) for line in (videos / "results.jsonl").read_text().splitlines()]
    assert {result["status"] for result in results} == {"done"} and {result["chunks"] for result in results} == {8}

    monkeypatch.chdir(tmp_path)
    (again,) = videos.glob(f"*{damaged[0].parents[1].name}.mp4")
    size = {"chunks": 8, "steps": 8, "height": 64, "width": 64, "cache": "none", "threads": 1}
    generate(Options(prompts=[PROMPTS[sorted(made).index(again)]], out="alone.mp4", **size), [])
    assert again.read_bytes() == Path("alone.mp4").read_bytes()

    digest = next(iter(made)).stem[-12:]
    for left in (f".checkpoints/{digest}/segments-libx264", f".checkpoints/{digest}/pp2/quantum-00000001-01234567"):
        (videos / left).mkdir(parents=True)
    (videos / "results.jsonl").unlink()  # what is known is written again
    runs.start()
    status, text = runs.end()
    assert status == 1 and "2 there already" in text
    results = [json.loads(line) for line in (videos / "results.jsonl").read_text().splitlines()]
    assert [(result["line"], result["status"]) for result in results] == [(1, "done"), (2, "done")]
    assert {path: path.stat().st_mtime_ns for path in videos.glob("*.mp4")} == made
    assert len(list(videos.iterdir())) == 3


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_a_video_on_ray_is_that_of_one_process_whatever_strangers_send(tmp_path, monkeypatch, command):
    """Somebody sends garbage to all ports of the command and its ranks; with Ray's they are at the loopback address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", {"prompt": PROMPTS[0]})
    ways = {"generate": [PROMPTS[0], "--launcher", "ray", "--out", "b/b.mp4"], "batch": ["prompts.jsonl", "--out", "b"]}
    size = ["--chunks", 2, "--steps", 8, "--height", 64, "--width", 64, "--threads", 1]
    Path("b").mkdir()
    made = flowcache_process(tmp_path, command, *ways[command], "--pp", 2, *size, "--interface", "lo")
    fuzzer = Fuzzer(made.pid, spares=lambda pid: pid != made.pid and "RankActor" not in command_of(pid))
    _, errors = made.communicate(timeout=120)
    assert fuzzer.stop() == {"127.0.0.1"} and len(fuzzer.ports) >= 4
    assert made.returncode == 0, errors
    options = Options(prompts=[PROMPTS[0]], out=Path("a.mp4"), chunks=2, steps=8, height=64, width=64, threads=1)
    generate(options, [])
    (video,) = Path("b").glob("*.mp4")
    assert Path("a.mp4").read_bytes() == video.read_bytes()


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 2 MB, and a function that makes it larger."""
    (folder := tmp_path / "disk").mkdir()
    with small_disk(folder, "2m") as enlarge:
        yield folder, enlarge


def test_a_full_disk_ends_a_batch_with_one_line_and_the_next_run_goes_on_with_another_layout(
    tmp_path, disk, monkeypatch
):
    disk, enlarge = disk
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", {"prompt": PROMPTS[0], "chunks": 6})
    command = ["batch", "prompts.jsonl", "--out", disk / "videos", "--steps", 8, "--threads", 1]
    command += ["--checkpoint-every", 1]
    full = flowcache_process(tmp_path, *command, extra=ray_workers())
    _, text = full.communicate(timeout=180)
    assert full.returncode == 2, text
    assert re.search(r"error: cannot write .*\.checkpoints/.*: no space left there, \d\.\d MB are free", text), text
    assert "was lost" not in text and "Traceback" not in text
    enlarge()
    again = flowcache_process(tmp_path, *command, "--pp", 2, extra=ray_workers())
    _, text = again.communicate(timeout=180)
    assert again.returncode == 0, text
    assert "computed again from its first chunk on" in text
    [video] = (disk / "videos").glob("*.mp4")
    assert {path.name for path in (disk / "videos").iterdir()} == {video.name, "results.jsonl"}
    generate(Options(prompts=PROMPTS[:1], out=Path("a.mp4"), chunks=6, steps=8, threads=1), [])
    assert video.read_bytes() == Path("a.mp4").read_bytes()


def test_a_file_of_bad_lines_only_is_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", "{broken", {"prompt": "a red circle moving right", "chunks": 0})
    assert run(["batch", "prompts.jsonl"]) == 2
    text = capsys.readouterr().err
    assert "line 1" in text and "line 2" in text

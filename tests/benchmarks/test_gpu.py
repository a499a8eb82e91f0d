"""The benchmark of one GPU, with tiny shapes on a CPU, and with nothing but what a plain checkout needs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common import run_command
from benchmarks.gpu.__main__ import all_parts, main

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"av", "ray", "transformers", "torchmetrics"}:
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def start(tmp_path):
    """Start the command as a process that can import neither PyAV nor Ray nor transformers nor torchmetrics."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKED)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", "import av"], env=env, capture_output=True).returncode
    started = []

    def begin(folder):
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--preset", "tiny", "--out", str(folder)]
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=-1, stderr=-1, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def run(folder, *arguments):
    return run_command(main, "gpu", ["--device", "cpu", "--preset", "tiny", "--out", str(folder), *arguments])


def complete(folder):
    """The parts that are measured to their ends, by their files' bytes."""
    files = {part.name: folder / f"{part.name}.json" for part in all_parts("cpu")}
    texts = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    return {name: text for name, text in texts.items() if json.loads(text)["complete"]}


def wait_for(process, folder, part):
    until = time.monotonic() + 120
    while part not in complete(folder) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None, "it has ended by itself"


@pytest.mark.slow
def test_it_runs_with_little_installed_and_goes_on_where_it_was_stopped(tmp_path, start, capsys, monkeypatch):
    folder = tmp_path / "out"
    interrupted = start(folder)
    wait_for(interrupted, folder, "peaks")
    interrupted.send_signal(signal.SIGINT)
    assert "missing: " in interrupted.communicate()[0] and interrupted.returncode == 130
    first = complete(folder)
    assert {"conformance", "peaks"} <= set(first) and "decode" not in first

    killed = start(folder)
    wait_for(killed, folder, "decode")
    killed.kill()
    killed.communicate()
    second = complete(folder)
    assert second.items() >= first.items() and "layer" not in second

    finished = start(folder)
    said, log = finished.communicate()
    assert finished.returncode == 0, log
    third = complete(folder)
    assert third.items() >= second.items() and set(third) == {part.name for part in all_parts("cpu")}
    assert "golden files: 4 of 4 pass" in said and "left out for" not in said and "missing" not in said
    assert all(f"## {name}\n" in said for name in ("conformance", "peaks", "pass-sdpa", "selection", "video", "decode"))
    assert (folder / "gpu.md").read_text() == said.rstrip("\n") + "\n"
    assert all((folder / f"{name}.png").stat().st_size > 10_000 for name in ("passes", "videos", "memory"))
    videos = {name: json.loads(text)["rows"][0] for name, text in third.items() if name.startswith("video-")}
    assert videos["video-none"]["computed"] == 1 > videos["video-flowcache-slow"]["computed"] > 0
    assert all(row["chunks"] == 10 and row["estimate GB"] > 0 and row["peak GB"] > 0 for row in videos.values())
    passes = json.loads(third["pass-sdpa"])["rows"]
    assert [row["keys, chunks"] for row in passes] == [1, 2, 3, 4, 5] and passes[4]["TFLOP"] > passes[0]["TFLOP"]
    for row in passes:
        assert row["ms attention"] + row["ms products"] + row["ms other"] == pytest.approx(row["ms"])

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(folder) == 0 and complete(folder) == third
    assert ": video-teacache, about" in log and "about" not in capsys.readouterr().err


def test_what_does_not_fit_into_the_time_is_left_out_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(tmp_path, "--minutes", "0", "--only", "projection", "--only", "decode") == 0
    assert "left out for want of time: decode, projection; the same" in capsys.readouterr().out
    assert not complete(tmp_path)
    assert run(tmp_path, "--only", "projection") == 0
    ways = json.loads(complete(tmp_path)["projection"])["rows"]
    assert ways[0]["relative error"] < 1e-5 < 1e-4 < ways[-1]["relative error"] < 1e-2
    assert "## decode" not in (tmp_path / "gpu.md").read_text()


def test_parts_of_another_code_are_not_mixed_in(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(tmp_path, "--only", "projection") == 0
    path = tmp_path / "projection.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"of": values["of"] | {"code": "0123"}}))
    before = path.read_bytes(), (tmp_path / "gpu.md").read_bytes()
    capsys.readouterr()
    assert run(tmp_path, "--only", "attention") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is of code 0123, preset tiny, device CPU" in line and "--out" in line
    assert before == (path.read_bytes(), (tmp_path / "gpu.md").read_bytes())
    path.write_text("[]")
    assert run(tmp_path, "--only", "attention") == 2


def test_a_part_that_fails_stops_no_other_and_is_tried_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("benchmarks.gpu.operations._retiring", lambda bench: 1 / 0)
    assert run(tmp_path, "--only", "selection", "--only", "projection") == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "selection: division by zero" in text and "## projection" in text
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(tmp_path, "--only", "selection", "--only", "projection") == 0
    assert set(complete(tmp_path)) == {"selection", "projection"}


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(tmp_path, "--only", "nothing") == 2
    assert run(tmp_path, "--preset", "huge") == 2
    said = capsys.readouterr().err.splitlines()
    assert "unknown part 'nothing'" in said[0] and "unknown preset 'huge'" in said[1] and len(said) == 2

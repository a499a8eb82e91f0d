"""The command line on ranks: started by torchrun or by itself, several videos, traces, and one line for every error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import av
import pytest
from PIL import Image

from engine.record import RunRecord
from launch.cli import run
from launch.options import Options
from parallel.comm.sockets import interface_of
from parallel.health.processes import descendants
from tests.launch.process import ROOT, Result, environment, flowcache_process, overflowing_weights, wait_for_frames
from tests.launch.videos import generate_video
from tests.parallel.forked import interpreter
from tests.parallel.strangers import Fuzzer, listening, own_address, reaches
from tests.ports import free_ports

GOLDENS = ROOT / "tests" / "data" / "goldens"
pytestmark = pytest.mark.slow
PROMPT, OTHER = "a red circle moving right", "a blue cross moving up"


def torchrun(folder: Path, ranks: int, *arguments: object, program: Sequence[str] = ("-m", "launch")) -> Result:
    """Run a command on ranks that torchrun starts, and which have imported everything."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, *program, *map(str, arguments)],
        cwd=folder,
        env={**environment(), "PYTHON_EXEC": interpreter()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def errors(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if line.startswith("flowcache: error: ")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, random_weights: Path) -> tuple[Path, Result]:
    """A video of two ranks, with a record and a trace."""
    folder = tmp_path_factory.mktemp("made")
    options = ["--chunks", 2, "--steps", 4, "--weights", random_weights, "--record", "run", "--trace", "t.json"]
    return folder, torchrun(folder, 2, "generate", PROMPT, "--pp", 2, *options, "--cache-threshold", 0.3)


# ---- one video


SMALL = ["--chunks", 2, "--steps", 8, "--height", 64, "--width", 64, "--threads", 1]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layer", [1, 4])
@pytest.mark.usefixtures("forked_ranks")
def test_what_comes_to_nan_ends_with_tick_chunk_and_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ranks: int, layer: int
) -> None:
    """The rank that holds the layer, whichever sees it in the end."""
    weights = overflowing_weights(tmp_path / "weights", f"videodit_blocks.layers.{layer}.mlp.linear_fc2.weight")
    monkeypatch.chdir(tmp_path)
    assert run(["generate", PROMPT, "--pp", str(ranks), "--weights", str(weights), *map(str, SMALL)]) == 1
    rank = int(ranks == 2 and layer == 4)
    text = f"flowcache: error: rank {rank} has computed NaN or infinity at tick 0, chunk 0: check the weights, "
    shown = capfd.readouterr()
    assert shown.out == "" and os.listdir(tmp_path) == ["weights"]
    assert errors(shown.err) == [text + "and the device of that rank"]


def test_ranks_make_the_video_of_one_process(made: tuple[Path, Result], random_weights: Path, tmp_path: Path) -> None:
    folder, result = made
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(folder)) == ["run", "t.json", "video.mp4"]
    lines = result.stdout.splitlines()
    assert lines[0] == "video.mp4: 48 frames of 64x64, 2.0 s of video" and len(lines) == 4
    assert lines[3].startswith("2 ranks, pp 2 x cp 1, layers 3,3; weights 6.9 MB, 6.9 MB, loaded in ")
    assert lines[3].endswith("; tensors moved over gloo")
    assert result.stderr.count("reading the prompt") == 1  # the other rank is silent
    record = RunRecord.load(folder / "run")
    assert (record.settings["pp"], record.settings["cp"], record.settings["layers"]) == (2, 1, [3, 3])
    alone = Options(
        prompts=[PROMPT],
        out=tmp_path / "alone.mp4",
        weights=random_weights,
        steps=4,
        chunks=2,
        threads=1,
        cache_threshold=0.3,
    )
    computed = generate_video(alone).computed
    assert computed == pytest.approx(record.computed_fraction) and computed < 1
    assert (folder / "video.mp4").read_bytes() == alone.out.read_bytes()


def test_the_trace_has_spans_of_all_ranks(made: tuple[Path, Result]) -> None:
    folder, _ = made
    assert (folder / "t.json").read_bytes() == (folder / "run" / "trace.json").read_bytes()
    events = json.loads((folder / "t.json").read_text())["traceEvents"]
    items = []
    for rank in range(2):
        computed = sorted(
            (event for event in events if event.get("cat") == "compute" and event["pid"] == rank),
            key=lambda event: event["ts"],
        )
        assert all(one["ts"] + one["dur"] <= two["ts"] + 0.2 for one, two in zip(computed, computed[1:]))
        items.append([event["args"] for event in computed])
    assert items[0] == items[1] and len(items[0]) >= 4
    kinds = {(event["pid"], event["cat"]) for event in events if "cat" in event}
    assert kinds >= {(rank, kind) for rank in range(2) for kind in ("compute", "wait", "send")}
    assert (0, "decode") in kinds and (0, "reuse") in kinds
    for rank in range(2):
        sent = [event for event in events if event.get("cat") == "send" and event["pid"] == rank]
        assert len(sent) == len(items[0]) and {event["tid"] for event in sent} == {2}


def test_the_trace_is_drawn_and_explained(
    made: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made[0])
    assert run(["plot", "pipeline", "run", "--out", "plot.png"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "plot.png" and [line.split()[:2] for line in shown[2:4]] == [["0", "0"], ["1", "1"]]
    for line in shown[2:4]:
        figures = [float(word.rstrip("%")) for word in line.split()[2:]]
        assert sum(figures) == pytest.approx(100, abs=0.3) and figures[0] > 5
    with Image.open("plot.png") as image:
        assert image.width > 1000 and len(image.getcolors(1 << 24) or ()) > 10
    Path("plot.png").unlink()


def test_a_run_without_ranks_has_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    assert run(["plot", "pipeline", "run"]) == 2
    assert "run holds no trace: record a run on ranks" in capsys.readouterr().err
    for damage in ("{", "[]", '{"traceEvents": [3]}', '{"traceEvents": [{"cat": "compute", "pid": 0}]}'):
        Path("run/trace.json").write_text(damage)
        assert run(["plot", "pipeline", "run"]) == 2
        assert "the trace run/trace.json is damaged" in capsys.readouterr().err
    Path("run/trace.json").write_text('{"traceEvents": []}')
    assert run(["plot", "pipeline", "run"]) == 2
    assert "has no computation in it" in capsys.readouterr().err
    assert os.listdir("run") == ["trace.json"]


# ---- several videos


def test_two_videos_share_two_ranks_whatever_strangers_send(tmp_path: Path, random_weights: Path) -> None:
    """Started by the command itself; the second video is the one that its own seed makes.

    Meanwhile somebody sends garbage to every port that is open, and nobody reaches one from another address.
    """
    options = ["--chunks", 1, "--steps", 4, "--weights", random_weights]
    process = flowcache_process(
        tmp_path, "generate", PROMPT, OTHER, "--pp", 2, *options, "--out", "videos", "--record", "runs"
    )
    fuzzer, reached = Fuzzer(process.pid), False
    while process.poll() is None:
        ports = sorted(fuzzer.ports)
        reached |= any(reaches(host, port) for port in ports for host in ("127.0.0.2", own_address()) if host)
        time.sleep(0.5)
    assert fuzzer.stop() == {"127.0.0.1"} and len(fuzzer.ports) >= 3 and not reached  # the store, and gloo twice
    shown, said = process.communicate()
    result = Result(process.args, process.returncode, shown, said)
    assert result.returncode == 0, result.stderr
    names = ["00-a-red-circle-moving-right", "01-a-blue-cross-moving-up"]
    assert sorted(os.listdir(tmp_path / "videos")) == [f"{name}.mp4" for name in names]
    assert sorted(os.listdir(tmp_path / "runs")) == [*names, "trace.json"]
    assert RunRecord.load(tmp_path / "runs" / names[1]).settings["prompt"] == OTHER
    assert "2 videos made in" in result.stdout and "2 ranks, pp 2 x cp 1" in result.stdout
    assert f"videos/{names[0]}.mp4 is complete (" in result.stderr
    alone = Options(
        prompts=[OTHER], seed=1, out=tmp_path / "alone.mp4", weights=random_weights, steps=4, chunks=1, threads=1
    )
    generate_video(alone)
    assert (tmp_path / "videos" / f"{names[1]}.mp4").read_bytes() == alone.out.read_bytes()


@pytest.mark.usefixtures("forked_ranks")
def test_finished_videos_stay_and_missing_ones_are_named(tmp_path: Path, random_weights: Path) -> None:
    options = ["--chunks", 30, "--steps", 4, "--weights", random_weights, "--threads", 1, "--out", "videos"]
    process = flowcache_process(tmp_path, "generate", PROMPT, OTHER, PROMPT, *options)
    first = tmp_path / "videos" / "00-a-red-circle-moving-right.mp4"
    try:
        assert process.stderr is not None
        assert any(f"videos/{first.name} is complete (1 of 3)" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    missing = "01-a-blue-cross-moving-up.mp4, 02-a-red-circle-moving-right.mp4"
    assert f"1 of 3 videos in videos are complete; missing: {missing}\n" in shown
    assert os.listdir(tmp_path / "videos") == [first.name]
    with av.open(str(first)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 30 * 24


# ---- errors


def test_a_wrong_number_of_ranks_is_said_once(tmp_path: Path) -> None:
    result = torchrun(tmp_path, 2, "generate", PROMPT, "--pp", 3)
    assert result.returncode == 1  # torchrun's own; the ranks' is 2
    assert errors(result.stderr) == [
        "flowcache: error: --pp 3 x --cp 1 needs 3 ranks, but 2 were started: "
        "torchrun --nproc-per-node 3 starts as many"
    ]
    assert "exitcode  : 2" in result.stderr and os.listdir(tmp_path) == []


SLOW = "import os, time; time.sleep(2 * (os.environ['RANK'] == '0')); from launch.cli import main; main()"


def test_the_others_wait_until_rank_0_has_said_it(tmp_path: Path) -> None:
    """torchrun ends all ranks once one has ended; a rank 0 that is slow to start was ended before it spoke."""
    program = tmp_path / "program" / "slow.py"
    program.parent.mkdir()
    program.write_text(SLOW)
    result = torchrun(program.parent, 2, "generate", PROMPT, "--pp", 3, program=[str(program)])
    assert len(errors(result.stderr)) == 1 and "--pp 3 x --cp 1 needs 3 ranks" in errors(result.stderr)[0]


def test_what_one_rank_alone_finds_is_said_by_it(tmp_path: Path) -> None:
    """Rank 0, on another machine, was started with other options and waits."""
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    process = flowcache_process(tmp_path, "generate", PROMPT, "--pp", 3, extra=env)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 2
    assert shown.startswith("flowcache: error: --pp 3 x --cp 1 needs 3 ranks") and shown.count("\n") == 1


def test_what_a_rank_finds_is_said_once(tmp_path: Path) -> None:
    result = torchrun(tmp_path, 2, "generate", "a red dog", "--pp", 2)
    assert result.returncode == 1 and result.stdout == ""
    assert len(errors(result.stderr)) == 1 and "unknown word 'dog'" in errors(result.stderr)[0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.usefixtures("forked_ranks")
def test_a_signal_ends_ranks_that_the_command_has_started(
    tmp_path: Path, random_weights: Path, sent: signal.Signals, status: int
) -> None:
    options = ["--chunks", 5000, "--steps", 4, "--weights", random_weights, "--out", "long.mp4", "--pp", 2]
    process = flowcache_process(tmp_path, "generate", PROMPT, *options)
    try:
        wait_for_frames(process, tmp_path / "long.mp4")
        process.send_signal(sent)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in shown
    assert shown.splitlines()[-1] == "flowcache: stopped"
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("forked_ranks")
def test_nothing_is_left_of_a_rank_that_is_killed(tmp_path: Path, random_weights: Path) -> None:
    """Rank 0 writes the video; the command that has started it removes what it leaves."""
    options = ["--chunks", 5000, "--steps", 4, "--weights", random_weights, "--out", "long.mp4", "--pp", 2]
    process = flowcache_process(tmp_path, "generate", PROMPT, *options)
    try:
        deadline, parts = time.monotonic() + 90, list[Path]()
        while not parts:
            assert process.poll() is None and time.monotonic() < deadline, "no file was begun"
            time.sleep(0.05)
            parts = list(tmp_path.glob(".long.partial.mp4.*"))
        os.kill(int(parts[0].stem.rpartition("-")[2]), signal.SIGKILL)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "rank 0 (stage 0 of 2) " in shown.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_ranks_of_several_machines_listen_at_an_interface_and_need_a_secret(
    tmp_path: Path, random_weights: Path
) -> None:
    """Two ranks that meet at an address which other machines reach as well; nobody says that they share one."""
    here = own_address()
    if here is None or (interface := interface_of(here)) is None:
        pytest.skip("this machine has no address but the loopback one")
    [port] = free_ports(1)
    options = ["--chunks", 1, "--steps", 4, "--weights", random_weights, "--pp", 2, "--threads", 1, "--out", "a.mp4"]

    def start(rank: int, secret: str) -> subprocess.Popen[str]:
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": here, "MASTER_PORT": str(port)}
        return flowcache_process(
            tmp_path, "generate", PROMPT, *options, "--interface", interface, extra={**env, "FLOWCACHE_SECRET": secret}
        )

    alone = start(0, "")
    _, said = alone.communicate(timeout=60)
    assert alone.returncode == 2 and "need the same FLOWCACHE_SECRET" in said
    ranks = [start(rank, "a secret") for rank in range(2)]
    found = set[str]()
    while ranks[0].poll() is None:
        found |= {host for rank in ranks for host, _ in listening([rank.pid])}
        time.sleep(0.1)
    shown = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], shown
    assert found == {here} and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(("rank", "sent"), [(1, signal.SIGTERM), (0, signal.SIGKILL)])
def test_a_lost_rank_is_one_line_and_leaves_nothing(
    tmp_path: Path, random_weights: Path, rank: int, sent: signal.Signals
) -> None:
    """Be it told to stop or killed, and be it the one that writes the file: status 1, as if by nobody's wish."""
    options = ["--chunks", 5000, "--steps", 4, "--weights", random_weights, "--out", "long.mp4", "--pp", 2]
    process = flowcache_process(tmp_path, "generate", PROMPT, *options)
    try:
        wait_for_frames(process, tmp_path / "long.mp4")
        for pid in descendants(process.pid):
            if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                os.kill(pid, sent)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in shown
    [error] = [line for line in shown.splitlines() if line.startswith("flowcache: ")]
    how = r"was told to stop" if sent is signal.SIGTERM else r"(was ended by SIGKILL|has gone: it.*)"
    assert re.fullmatch(rf"flowcache: error: rank {rank} \(stage {rank} of 2\) {how}", error)
    assert os.listdir(tmp_path) == []


# ---- conformance


def test_conformance_on_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    """A golden file passes; one that is not there does not keep it from being checked."""
    assert (
        run(["conformance", "missing.safetensors", str(GOLDENS / "t2v_fullkv_window2.safetensors"), "--pp", "2"]) == 2
    )
    shown = capfd.readouterr()
    (line,) = shown.out.splitlines()
    assert line.startswith("t2v_fullkv_window2 ") and line.endswith("4 comparisons, pp 2 x cp 1  PASS")
    assert len(errors(shown.err)) == 1 and "missing.safetensors" in errors(shown.err)[0]
    assert len(shown.err.splitlines()) == 1

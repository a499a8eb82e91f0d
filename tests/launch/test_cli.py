"""The command line as a person meets it: statuses, one line for every bad input, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.cli import run
from models.magi.presets import PRESETS
from models.pocket.preset import pocket_config
from tests.launch.plots.records import made_up_record
from tests.launch.process import ROOT, Result, environment, flowcache_process, short_files, wait_for_frames

GOLDENS = ROOT / "tests" / "data" / "goldens"
PROMPT = "a red circle moving right"
Flowcache = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def long_run(tmp_path: Path, random_weights: Path, forked_ranks: None) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a long video, with frames in its hidden file already."""
    arguments = ["--chunks", 5000, "--steps", 4, "--weights", random_weights, "--threads", 1, "--out", "long.mp4"]
    process = flowcache_process(tmp_path, "generate", PROMPT, *arguments)
    try:
        wait_for_frames(process, tmp_path / "long.mp4")
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- help, version, models


def test_help_does_not_wait_for_torch_or_matplotlib() -> None:
    code = "import sys, launch.cli; sys.exit(not {'torch', 'numpy', 'matplotlib'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("Examples", "--seconds", "--chunks", "--image", "--video", "--config", "--weights", "--precision"):
        assert word in shown
    for word in ("Reuse", "--cache", "--cache-threshold", "--cache-warmup", "--reuse", "--no-clean-pass"):
        assert word in shown
    for word in ("Memory", "--kv-budget", "--kv-score", "--kv-retention", "--kv-queries", "Record", "RUN_DIR"):
        assert word in shown
    for word in ("Ranks", "--pp", "--cp", "--split", "--concurrency", "--trace"):
        assert word in shown


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"flowcache {declared}\n"


def test_models_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    shown = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f" {name} " in shown
        assert preset.folder is None or preset.folder in shown
    assert "23.9B" in shown and "1280x720" in shown and "Memory: an estimate" in shown
    assert "flowcache-engine[t5]" in shown  # and not taken for markup


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["  "], "the prompt is empty"),
        (["a red dog moving right"], "unknown word 'dog' in the prompt"),
        (["a red circle"], "the prompt names no motion"),
        ([PROMPT, "--height", "70"], "the height of 70 pixels is not a multiple of 16"),
        ([PROMPT, "--width", "0"], "--width 0 cannot be used: give 16 to 16,384"),
        ([PROMPT, "--height", str(10**12)], "--height 1000000000000 cannot be used: give 16 to 16,384"),
        ([PROMPT, "--height", "16384", "--width", "16384"], " GB are free: ask for a smaller --height and --width"),
        ([PROMPT, "--steps", "10"], "10 steps do not divide"),
        ([PROMPT, "--steps", "0"], "--steps 0 cannot be used: give 1"),
        ([PROMPT, "--seconds", "0"], "--seconds 0.0 cannot be used: give 0.001 to 1,000,000"),
        ([PROMPT, "--seconds", "-2"], "--seconds -2.0 cannot be used"),
        ([PROMPT, "--seconds", "nan"], "--seconds nan cannot be used"),
        ([PROMPT, "--seconds", "1e9"], "--seconds 1000000000.0 cannot be used"),
        ([PROMPT, "--chunks", "0"], "--chunks 0 cannot be used: give 1 to 1,000,000"),
        ([PROMPT, "--chunks", "99999999999"], "--chunks 99999999999 cannot be used: give 1 to 1,000,000"),
        ([PROMPT, "--seed", "-1"], "--seed -1 cannot be used: give 0"),
        ([PROMPT, "--seconds", "1", "--chunks", "1"], "--seconds and --chunks"),
        ([PROMPT, "--model", "magi-9b"], "unknown model 'magi-9b': choose from magi-pocket, magi-4.5b"),
        ([PROMPT, "--model", "magi-pocket", "--config", "x.json"], "--model and --config"),
        ([PROMPT, "--config", "missing.json"], "cannot read the configuration missing.json: No such file"),
        ([PROMPT, "--config", "broken.json"], "broken.json is not JSON"),
        ([PROMPT, "--config", "more.json"], "more.json: model_config.colour: unknown key"),
        ([PROMPT, "--config", "less.json"], "less.json: runtime_config.fps: key is missing"),
        ([PROMPT, "--image", "broken.json"], "cannot read the image broken.json"),
        ([PROMPT, "--video", "missing.mp4"], "cannot read the video missing.mp4: No such file"),
        ([PROMPT, "--image", "a.png", "--video", "b.mp4"], "--image and --video"),
        ([PROMPT, "--out", "missing/video.mp4"], "the folder missing does not exist"),
        ([PROMPT, "--out", "/proc/video.mp4"], "cannot write /proc/video.mp4"),
        ([PROMPT, "--out", "video.avi"], "must end in .mp4, .webm, .gif, or in / for a folder of png"),
        ([PROMPT, "--out", "-", "--preview"], "there is no name for a --preview"),
        ([PROMPT, "--weights", "missing"], "there is no folder missing"),
        ([PROMPT, "--weights", "."], "holds no model"),
        ([PROMPT, "--attention", "magic"], "unknown attention backend 'magic'"),
        ([PROMPT, "--precision", "low"], "Invalid value for '--precision': 'low' is not one of"),
        ([PROMPT, "--steps", "many"], "Invalid value for '--steps': it must be a valid integer"),
        ([PROMPT, "--threads", "0"], "--threads 0 cannot be used: give 1 to 1,024; this machine has"),
        ([PROMPT, "--threads", "100000"], "--threads 100000 cannot be used: give 1 to 1,024; this machine has"),
        (
            [PROMPT, "--cache", "fast"],
            "'--cache': 'fast' is not one of 'none', 'teacache', 'flowcache-slow', 'flow",
        ),
        ([PROMPT, "--cache", "none", "--cache-threshold", "0.1"], "--cache none reuses nothing: leave out --cache-thr"),
        ([PROMPT, "--cache", "none", "--reuse", "velocity"], "--cache none reuses nothing: leave out --reuse"),
        ([PROMPT, "--cache-threshold", "-1"], "--cache-threshold -1.0 cannot be used: give 0"),
        ([PROMPT, "--cache-threshold", "nan"], "--cache-threshold nan cannot be used"),
        ([PROMPT, "--cache-warmup", "16"], "--cache-warmup 16 computes all 16 steps"),
        ([PROMPT, "--cache-warmup", "0"], "--cache-warmup 0 cannot be used: give 1"),
        ([PROMPT, "--extrapolate-from", "1.5"], "--extrapolate-from 1.5 cannot be used: give 0 to 1"),
        ([PROMPT, "--reuse", "again"], "'again' is not one of 'residual', 'velocity', 'extrapolate'"),
        ([PROMPT, "--copy-pass", "--model", "magi-4.5b"], "--copy-pass is for distilled models"),
        ([PROMPT, "--kv-budget", "0"], "--kv-budget 0 cannot be used: give 1"),
        ([PROMPT, "--kv-retention", "frame"], "--kv-retention says how the past is compressed: give --kv-budget"),
        ([PROMPT, "--kv-budget", "1", "--kv-queries", "word"], "'word' is not one of 'token', 'frame', 'chunk'"),
        ([PROMPT, "--record", "broken.json"], "cannot write broken.json"),
        ([PROMPT, "--record", "broken.json/run"], "broken.json is not a folder"),
        ([PROMPT, "--record", "/proc/run"], "cannot write /proc/run"),
        ([PROMPT, "--colour", "red"], "No such option: --colour"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    folder: Path, random_weights: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    values = pocket_config().to_dict()
    Path("broken.json").write_text("{")
    Path("more.json").write_text(json.dumps(values | {"model_config": values["model_config"] | {"colour": 1}}))
    del values["runtime_config"]["fps"]
    Path("less.json").write_text(json.dumps(values))
    before = sorted(os.listdir(folder))
    weights = [] if "--weights" in arguments else ["--weights", str(random_weights)]
    assert run(["generate", *arguments, *weights]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowcache: error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert sorted(os.listdir(folder)) == before


def test_a_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["paint"]) == 2
    assert capsys.readouterr().err == "flowcache: error: No such command 'paint'.\n"


def test_truncated_weights_name_the_file_and_the_tensor(
    folder: Path, random_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(random_weights, "weights")
    path = Path("weights") / "inference_weight.distill" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    assert run(["generate", PROMPT, "--weights", "weights"]) == 2
    shown = capsys.readouterr().err
    with safe_open(random_weights / path.relative_to("weights"), "pt") as file:
        assert f"{path} is truncated" in shown and any(name in shown for name in file.keys())
    assert os.listdir(folder) == ["weights"]


def test_missing_weights_name_the_file(folder: Path, random_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(random_weights, "weights")
    path = Path("weights") / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    assert run(["generate", PROMPT, "--weights", "weights"]) == 2
    assert f"cannot read the weights {path}: No such file" in capsys.readouterr().err
    assert os.listdir(folder) == ["weights"]


def test_a_bad_prompt_of_a_real_process(flowcache: Flowcache, tmp_path: Path) -> None:
    result = flowcache("generate", "")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "flowcache: error: the prompt is empty: say what the video shows\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_threads_that_wait_leave_the_cores_to_others(tmp_path: Path) -> None:
    """OpenMP says how it was set up when torch is loaded; what the user has chosen stays."""
    for given, kept in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")):
        process = flowcache_process(tmp_path, "generate", "", extra={"OMP_DISPLAY_ENV": "TRUE", **given})
        assert f"OMP_WAIT_POLICY = '{kept}'" in process.communicate(timeout=60)[1]


def test_no_space_left_is_one_line_and_leaves_nothing(
    folder: Path, random_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel refuses to let files grow beyond 30 kB, in the middle of the video."""
    with short_files(30_000):
        assert run(["generate", PROMPT, "--weights", str(random_weights), "--steps", "4", "--threads", "1"]) == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("flowcache: error: cannot write video.mp4: no space left there")
    assert "Traceback" not in shown and os.listdir(folder) == []


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_standard_output_that_takes_no_more_is_one_line_and_the_video_stays(
    tmp_path: Path, random_weights: Path
) -> None:
    options = ["--chunks", 1, "--steps", 4, "--weights", random_weights, "--threads", 1]
    made_up_record().save(tmp_path / "run")
    for arguments in (["generate", PROMPT, *options], ["generate", PROMPT, *options, "--pp", 2], ["plot", "kv", "run"]):
        with open("/dev/full", "w") as full:
            process = flowcache_process(tmp_path, *arguments, output=full)
            _, errors = process.communicate(timeout=120)
        said = "flowcache: error: cannot write to standard output: No space left on device; what was made is there"
        assert process.returncode == 3 and errors.splitlines()[-1] == said and errors.count("error") == 1
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 24
    assert (tmp_path / "run" / "kv.png").stat().st_size > 1000


# ---- videos


@pytest.mark.slow
def test_generate_as_a_real_process(flowcache: Flowcache, tmp_path: Path, random_weights: Path) -> None:
    result = flowcache(
        "generate", PROMPT, "--seconds", 2, "--steps", 4, "--weights", random_weights, "--out", "noise.mp4"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("noise.mp4: 48 frames of 64x64, 2.0 s of video\nmade in ")
    assert (
        "loading magi-pocket, cpu, attention by sdpa" in result.stderr
        and "chunks 2/2, step 4/4, 100%, " in result.stderr
    )
    assert "\x1b" not in result.stdout + result.stderr
    with av.open(str(tmp_path / "noise.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 48 and (frames[0].width, frames[0].height) == (64, 64)
    assert os.listdir(tmp_path) == ["noise.mp4"]


def test_a_configuration_file_in_place_of_a_preset(
    folder: Path, random_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = pocket_config().to_dict()
    values["runtime_config"] |= {"load": str(random_weights), "num_frames": 24, "num_steps": 4, "video_size_w": 96}
    Path("config.json").write_text(json.dumps(values))
    assert run(["generate", PROMPT, "--config", "config.json", "--precision", "fast", "--threads", "1"]) == 0
    assert "video.mp4: 24 frames of 96x64" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)])
def test_an_interrupt_stops_soon_and_leaves_nothing(
    tmp_path: Path, long_run: subprocess.Popen[str], sent: signal.Signals, status: int
) -> None:
    began = time.monotonic()
    long_run.send_signal(sent)
    _, shown = long_run.communicate(timeout=30)
    assert time.monotonic() - began < 20  # of minutes that the video would take; a busy machine is slow to stop too
    assert long_run.returncode == status
    assert "Traceback" not in shown and shown.endswith("\nflowcache: stopped\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_removed_by_the_next(
    tmp_path: Path, long_run: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, random_weights: Path
) -> None:
    long_run.kill()
    long_run.communicate()
    hidden, shown = sorted(os.listdir(tmp_path))  # and no long.mp4
    assert hidden.startswith(".long.partial.mp4.") and shown == "long.partial.mp4"
    assert (tmp_path / shown).samefile(tmp_path / hidden)
    process = Path("/proc", hidden.removesuffix(".part").rpartition("-")[2])
    while process.exists():  # until it is waited for, which the command is before
        time.sleep(0.01)
    monkeypatch.chdir(tmp_path)
    assert run(["generate", PROMPT, "--chunks", "1", "--steps", "4", "--weights", str(random_weights)]) == 0
    assert os.listdir(tmp_path) == ["video.mp4"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_the_longest_video_begins_at_once(tmp_path: Path, random_weights: Path) -> None:
    """Nothing is laid out in proportion to the length before the first step."""
    options = ["--chunks", 1_000_000, "--steps", 4, "--weights", random_weights, "--threads", 1, "--record", "run"]
    process = flowcache_process(tmp_path, "generate", PROMPT, *options)
    try:
        assert process.stderr is not None
        began = time.monotonic()
        lines = [process.stderr.readline() for _ in range(3)]
        assert time.monotonic() - began < 30 and lines[2].startswith("chunks 0/1000000, step 1/4, 0%")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_magi_pocket_shows_what_its_prompt_says(folder: Path) -> None:
    """The trained weights that ship: the strongest colour of the frames is red, and then blue."""
    for colour, channel in (("red", 0), ("blue", 2)):
        out = f"{colour}.mp4"
        assert run(["generate", f"a {colour} square moving right", "--chunks", "1", "--seed", "1", "--out", out]) == 0
        with av.open(str(folder / out)) as container:
            last = list(container.decode(video=0))[-1].to_ndarray(format="rgb24").reshape(-1, 3).astype(int)
        saturation = last.max(axis=1) - last.min(axis=1)
        strongest = last[saturation.argsort()[-200:]]  # pixels of the object, on a grey background
        assert strongest.mean(axis=0).argmax() == channel and saturation.max() > 60


# ---- conformance


def test_conformance_passes_on_golden_files(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(GOLDENS / f"{name}.safetensors") for name in ("vae", "t2v_fullkv_window2")]
    assert run(["conformance", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["vae", "t2v_fullkv_window2"]
    assert all("relative error" in line and line.endswith("PASS") for line in lines)


def test_conformance_leaves_out_the_weights_that_lie_beside_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("timestep_matrix", "weights_fps", "forward_fps", "weights_nofps")
    files = [str(GOLDENS / "skyreels" / f"{name}.safetensors") for name in names]
    assert run(["conformance", *files]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [names[0], names[2]]
    assert run(["conformance", files[1]]) == 2
    assert "weights_fps.safetensors has kind 'wan_weights': known kinds are" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_conformance_on_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conformance", str(GOLDENS / "vae.safetensors"), "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("flowcache: error: --device cuda was asked for, but this machine has no")


def test_conformance_fails_when_one_number_is_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "t2v_fullkv_window2.safetensors"
    shutil.copy(GOLDENS / "weights.safetensors", folder)
    with safe_open(GOLDENS / name, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(GOLDENS / name)
    tensors["output.chunk.000"].view(-1)[0] += 1
    save_file(tensors, folder / name, metadata)
    assert run(["conformance", name]) == 1
    assert capsys.readouterr().out.rstrip().endswith("FAIL")


def test_conformance_of_a_file_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"some": torch.zeros(1)}, folder / "other.safetensors")
    Path("text.safetensors").write_text("no tensors")
    good = GOLDENS / "vae.safetensors"
    for bad in ("other.safetensors", "text.safetensors", "missing.safetensors"):
        assert run(["conformance", bad, str(good)]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("flowcache: error: ") and bad in shown.err and shown.err.count("\n") == 1
        assert shown.out.startswith("vae ") and shown.out.rstrip().endswith("PASS")  # the others are checked

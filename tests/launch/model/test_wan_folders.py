"""SkyReels-V2 and Self-Forcing as they are downloaded: inspected, and made videos with."""

import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli import run
from launch.output.video import VideoWriter
from tests.launch.output.test_streaming import frames_of
from tests.launch.process import flowcache_process
from tests.models.wan.damage import DAMAGE, damaged
from tests.models.wan.downloaded import LAYOUTS

IMAGES = ("image", "image of diffusers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {name: lay_out(root / name) for name, lay_out in LAYOUTS.items()}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return "picture.png"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in IMAGES])
def test_inspect_says_what_it_is_and_what_it_takes(folders, layout, capsys):
    assert run(["inspect", str(folders[layout]), "--height", "64", "--width", "64", "--verify"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    method = "self-forcing" if layout == "self-forcing" else "diffusion forcing"
    assert f"a causal Wan of {2 if layout == 'self-forcing' else 3} layers" in shown and f"by {method}" in shown
    assert "84,575 parameters" in shown and "UMT5" in shown and "1 x 1" in shown and "2 x 1" in shown
    assert f"All {69 + 194 if layout == 'self-forcing' else 101 + 194} tensors are numbers" in shown


def test_inspect_names_what_is_missing_and_what_is_damaged(folders, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(folders["released"], folder)
    state = torch.load(folder / "Wan2.1_VAE.pth", weights_only=True)
    state["conv1.bias"][0] = float("nan")
    torch.save(state, folder / "Wan2.1_VAE.pth")
    assert run(["inspect", str(folder), "--height", "64", "--width", "64"]) == 0
    assert run(["inspect", str(folder), "--height", "64", "--width", "64", "--verify"]) == 1
    assert "conv1.bias holds values that are not numbers" in " ".join(capsys.readouterr().out.split())
    (folder / "Wan2.1_VAE.pth").unlink()
    shutil.rmtree(folder / "google")
    assert run(["inspect", str(folder)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "no Wan2.1_VAE.pth in" in shown and "no google/umt5-xxl in" in shown and "101 tensors" in shown


def test_models_lists_both_families(capsys):
    assert run(["models"]) == 0
    shown = capsys.readouterr().out
    assert "magi-pocket" in shown and "self-forcing-1.3b" in shown and "Skywork/SkyReels-V2-DF-14B-720P" in shown


SMALL = ["--height", "32", "--width", "32", "--chunks", "2", "--steps", "4"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in IMAGES])
def test_a_folder_makes_videos_which_are_the_same_on_two_ranks(folders, layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "a cat sits on a red mat", "--weights", str(folders[layout]), *SMALL]
    assert run([*asked, "--out", "one.mp4"]) == 0
    width = 3 if layout == "self-forcing" else 5
    assert f"one.mp4: {1 + 4 * (2 * width - 1)} frames of 32x32" in capsys.readouterr().out
    assert run([*asked, "--out", "two.mp4", "--pp", "2"]) == 0
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    assert run([*asked, "--out", "other.mp4", "--seed", "1"]) == 0
    assert (tmp_path / "one.mp4").read_bytes() != (tmp_path / "other.mp4").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_a_long_video_that_was_killed_in_its_second_span_goes_on_and_can_be_made_longer(folders, tmp_path, monkeypatch):
    """Five chunks, four and one: frames are those of an undisturbed video, here and when two more are added."""
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "a cat", "--weights", str(folders["released"]), *SMALL[:4], "--steps", "4", "--threads", "1"]
    assert run([*asked, "--chunks", "12", "--out", "longer.mp4"]) == 0
    asked += ["--chunks", "10", "--checkpoint-every", "1", "--checkpoint", "kept", "--keep-state", "--out", "a.mp4"]
    process = flowcache_process(tmp_path, *asked)
    while not list(tmp_path.glob("kept/*/pp1/quantum-0000000[678]-*/manifest.json")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "a.mp4").exists()
    process = flowcache_process(tmp_path, *asked)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert (state := next(tmp_path.glob("kept/*"))) and not list(state.glob("pp1/quantum-0000000[0-5]-*"))
    assert run(["continue", "kept", "--seconds", "1.6", "--out", "b.mp4"]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "longer.mp4").read_bytes()
    whole, short = (frames_of(tmp_path / name) for name in ("longer.mp4", "a.mp4"))
    assert len(short) == 1 + 4 * 49 and np.array_equal(short, whole[: len(short)])


@pytest.mark.slow
def test_a_clip_is_gone_on_from_in_whole_chunks(folders, tmp_path, monkeypatch, capsys):
    """Its last 17 frames are five latent frames; what is made is decoded as what comes after them."""
    monkeypatch.chdir(tmp_path)
    with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    asked = ["generate", "a cat", "--weights", str(folders["released"]), *SMALL, "--out", "x.mp4"]
    assert run([*asked, "--video", "clip.mp4"]) == 0
    assert "x.mp4: 40 frames of 32x32" in capsys.readouterr().out
    with VideoWriter(tmp_path / "short.mp4", fps=24) as writer:
        writer.write(np.zeros((12, 32, 32, 3), dtype=np.uint8))
    assert run([*asked, "--video", "short.mp4"]) == 2
    assert "this model goes on from 17 frames and more, and 12 are given" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("layout", IMAGES)
def test_an_image_becomes_a_video_which_is_the_same_on_two_ranks(
    folders, layout, picture, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "a cat", "--weights", str(folders[layout]), *SMALL[:4], "--steps", "3", "--image", picture]
    assert run([*asked, "--out", "one.mp4"]) == 0
    assert "one.mp4: 97 frames of 32x32" in capsys.readouterr().out
    assert run([*asked, "--out", "two.mp4", "--pp", "2"]) == 0
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    Image.new("RGB", (40, 48), (255, 0, 0)).save(tmp_path / picture)
    assert run([*asked, "--out", "other.mp4"]) == 0
    assert (tmp_path / "one.mp4").read_bytes() != (tmp_path / "other.mp4").read_bytes()
    capsys.readouterr()
    assert run(["inspect", str(folders[layout]), "--height", "64", "--width", "64", "--verify"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "by image to video" in shown and "CLIP" in shown


@pytest.mark.slow
def test_whole_windows_begin_with_noise_an_image_or_a_clip(folders, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "a cat", "--weights", str(folders["released"]), *SMALL[:4], "--steps", "3", "--out", "x.mp4"]
    assert run([*asked, "--sampling", "staggered", "--chunks", "1", "--cache", "teacache"]) == 0
    assert "x.mp4: 97 frames of 32x32" in capsys.readouterr().out
    asked = [*asked, "--chunks", "1"]
    assert run([*asked, "--sampling", "window", "--image", picture, "--end-image", picture]) == 0
    assert "x.mp4: 97 frames of 32x32" in capsys.readouterr().out
    with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    for way in ("window", "staggered"):
        assert run([*asked, "--sampling", way, "--video", "clip.mp4"]) == 0
        assert "x.mp4: 80 frames of 32x32" in capsys.readouterr().out


@pytest.mark.slow
def test_reuse_is_that_of_the_model(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "a cat", "--weights", str(folders["released"]), *SMALL[:-1], "10", "--cache", "flowcache-slow"]
    assert run(asked) == 0
    assert "(flowcache-slow)" in (shown := capsys.readouterr().out) and "100% of the steps" not in shown


WRONG = {
    "no weights": (["--model", "self-forcing-1.3b"], "has no weights here: download gdhe17/Self-Forcing"),
    "MAGI's options": (["--weights", "released", "--special", "HQ"], "--special is for MAGI-1"),
    "another of them": (["--weights", "released", "--window", "2"], "--window is for MAGI-1"),
    "few products in fp32": (["--weights", "released", "--precision", "fast"], "--precision is for MAGI-1"),
    "no image": (["--weights", "image"], "makes a video of an image: give it with --image"),
    "reuse of images": (["--weights", "image", "--image", "x.png", "--cache", "teacache"], "no figures of reuse"),
    "another way of images": (["--weights", "image", "--sampling", "groups"], "is sampled in one way"),
    "a way of MAGI": (["--sampling", "window"], "--sampling is for SkyReels-V2"),
    "an end of groups": (["--weights", "released", "--end-image", "x.png"], "cannot be told of its end so"),
    "more than a window": (["--weights", "released", "--sampling", "window"], "2 chunks are too many: this way of"),
    "a copy pass": (["--weights", "released", "--copy-pass"], "--copy-pass is for distilled models"),
    "reuse of few steps": (["--weights", "self-forcing", "--cache", "teacache"], "no figures of reuse"),
    "heads": (["--weights", "self-forcing", "--cp", "2"], "--cp 2 does not divide the model's 1 key heads"),
    "layers": (["--weights", "released", "--pp", "4"], "3 layers cannot be split over 4 stages"),
    "an unknown model": (["--model", "skyreels"], "choose from magi-pocket"),
}


@pytest.mark.parametrize(("given", "said"), list(WRONG.values()), ids=list(WRONG))
def test_what_does_not_fit_is_one_line(folders, tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    given = [str(folders[one]) if one in folders else one for one in given]
    assert run(["generate", "a cat", *SMALL, *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowcache: error: ")]
    assert len(lines) == 1 and said in lines[0] and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "damage"), [one[:2] for one in DAMAGE.values()], ids=list(DAMAGE))
def test_damage_is_one_line_and_status_2(folders, picture, tmp_path, monkeypatch, capsys, layout, damage):
    folder = damaged(folders[layout], tmp_path / "model", damage)
    monkeypatch.chdir(tmp_path)
    start = ["--image", picture] if layout in IMAGES else []
    assert run(["generate", "a cat", *SMALL[:4], "--chunks", "1", "--weights", str(folder), *start]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowcache: error: ")]
    assert len(lines) == 1 and str(folder) in lines[0] and not list(tmp_path.glob("*.mp4"))

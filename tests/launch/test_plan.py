"""From options to plans: what follows from the model, what is refused, names and seeds of several videos."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from engine.kv.layout import KVSettings
from engine.reuse.policy import ReuseSettings
from launch.cli import run
from launch.model.resolve import reuse_preset
from launch.options import Options, together
from launch.plan import Plan, plan_videos, video_names
from models.errors import InputError
from models.magi.family import POCKET_FIGURES, MagiLoader
from models.pocket.preset import pocket_config
from tests.models.downloaded import download

PROMPT, OTHER = "a red circle moving right", "a blue cross moving up"


@pytest.fixture
def options(random_weights: Path, tmp_path: Path) -> Options:
    return Options(prompts=[PROMPT], out=tmp_path / "video.mp4", weights=random_weights, steps=4, threads=1)


def _plan(options: Options, **changes: object) -> Plan:
    return plan_videos(replace(options, **changes))[0]


def test_what_is_not_given_comes_from_the_model(options: Options) -> None:
    request = _plan(options, steps=None).request
    assert (request.prompt, request.chunks, request.num_steps, request.seed) == (PROMPT, 4, 16, 0)
    assert (request.height, request.width, request.prefix) == (64, 64, None)


def test_what_is_given_replaces_it(options: Options) -> None:
    request = _plan(options, steps=8, chunks=7, height=96, width=32, seed=5).request
    assert (request.num_steps, request.chunks, request.height, request.width, request.seed) == (8, 7, 96, 32, 5)


@pytest.mark.parametrize(("seconds", "chunks"), [(1, 1), (4, 4), (4.001, 5), (0.01, 1), (2.5, 3)])
def test_seconds_are_rounded_up_to_chunks(options: Options, seconds: float, chunks: int) -> None:
    assert _plan(options, seconds=seconds).request.chunks == chunks


def test_seconds_of_another_frame_rate(options: Options, tmp_path: Path) -> None:
    values = pocket_config().to_dict()
    values["runtime_config"]["fps"] = 30
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert _plan(options, config=path, seconds=4).request.chunks == 5  # 120 frames in chunks of 24


def test_how_to_compute_reaches_the_model(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _plan(options, precision="fast", attention="auto", compile=True).model.source
    assert (source.precise, source.attention, source.compiled) == (False, "auto", True)
    with pytest.raises(InputError, match="--compile is for MAGI-1"):
        _plan(options, compile=True, model="self-forcing-1.3b", weights=None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="--compile needs a C"):
        _plan(options, compile=True)


def test_reuse_is_on_unless_it_is_turned_off(options: Options) -> None:
    assert _plan(options).model.reuse == reuse_preset("flowcache-slow", POCKET_FIGURES)
    assert _plan(options, cache="none").model.reuse == ReuseSettings()
    assert _plan(options).model.kv == KVSettings()


def test_a_guided_model_has_no_copy_pass(options: Options) -> None:
    with pytest.raises(InputError, match="--copy-pass is for distilled models"):
        _plan(options, model="magi-4.5b", steps=None, copy_pass=True)


def test_a_record_needs_a_folder_before_anything_is_read(options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder"):
        _plan(options, record=tmp_path / "file", weights=tmp_path / "missing")


def test_an_image_becomes_a_prefix_of_one_frame(options: Options, tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (30, 50), (10, 200, 30)).save(picture)
    prefix = _plan(options, image=picture).request.prefix
    assert prefix is not None and prefix.shape == (1, 64, 64, 3)
    assert prefix[0, 32, 32].tolist() == pytest.approx([10, 200, 30], abs=2)


def test_the_size_is_checked_before_a_prefix_is_read(options: Options, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="height of 70 pixels is not a multiple of 16"):
        _plan(options, height=70, image=tmp_path / "missing.png")


def test_weights_that_were_not_downloaded_are_named(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(options.out.parent)
    with pytest.raises(InputError, match=r"no weights in ./downloads/4.5B_base: download ckpt/magi/4.5B_base from"):
        _plan(options, model="magi-4.5b", weights=None)


# ---- several videos


def test_names_follow_from_the_prompts() -> None:
    assert video_names(["A red circle!", "été, 東京", "../..", "x" * 99]) == [
        "00-a-red-circle",
        "01-été-東京",
        "02",
        "03-" + "x" * 40,
    ]
    assert video_names(["a"] * 101)[100] == "100-a"


def test_several_videos_have_seeds_and_records_of_their_own(random_weights: Path, tmp_path: Path) -> None:
    options = Options(
        prompts=[PROMPT, OTHER],
        out=tmp_path / "deep" / "videos",
        weights=random_weights,
        seed=7,
        record=tmp_path / "run",
    )
    first, second = plan_videos(options)
    assert (first.request.seed, second.request.seed) == (7, 8)
    assert (first.request.prompt, second.request.prompt) == (PROMPT, OTHER)
    assert second.out == tmp_path / "deep" / "videos" / "01-a-blue-cross-moving-up.mp4"
    assert second.record == tmp_path / "run" / "01-a-blue-cross-moving-up"
    with pytest.raises(InputError, match="unknown word 'dog'"):
        plan_videos(replace(options, prompts=[PROMPT, "a red dog moving up"]))
    assert os.listdir(tmp_path) == []


def test_more_stages_want_more_videos() -> None:
    assert [together(Options(pp=pp), 9, ranks=True) for pp in (1, 2, 4, 5, 8)] == [2, 2, 2, 3, 4]
    assert together(Options(pp=8), 3) == 3 and together(Options(concurrency=5), 9) == 5
    assert together(Options(), 9) == 1


# ---- ranks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pp", "7"], "6 layers cannot be split over 7 stages: give --pp 1 to 6"),
        (["--pp", "0"], "--pp 0 cannot be used: give 1 or more"),
        (["--cp", "0"], "--cp 0 cannot be used: give 1 or more"),
        (["--pp", "2", "--split", "3,4"], "--split 3,4 places 7 layers, but the model has 6"),
        (["--pp", "2", "--split", "6"], "--split 6 names 1 stages, but there are 2"),
        (["--cp", "5"], "--cp 5 does not divide the model's"),
        (["--concurrency", "0"], "--concurrency 0 cannot be used: give 1"),
        (["--trace", "trace.txt"], "the name of the trace must end in .json"),
        ([OTHER, "--out", "video.mp4"], "--out video.mp4 names one video, but there are 2 prompts"),
        ([OTHER, "--out", "file"], "file is not a folder"),
        ([OTHER, " "], "the prompt is empty"),
        (["--pp", "2", "--image", "missing.png"], "cannot read the image missing.png"),
    ],
)
def test_bad_input_is_said_before_ranks_are_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_weights: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert run(["generate", PROMPT, "--weights", str(random_weights), *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("flowcache: error: ") and said in shown and shown.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"]


def _released(tmp_path: Path, name: str, **given: object) -> MagiLoader:
    folder = tmp_path / "ckpt" / "magi" / name
    if not folder.is_dir():
        download(tmp_path, name)
    options = Options(prompts=["a cat"], weights=folder, height=32, width=32, steps=8, **given)
    return plan_videos(replace(options, out=tmp_path / "x.mp4"))[0].model.source.loader  # type: ignore[return-value]


def test_settings_of_a_released_model_are_changed_one_by_one(tmp_path: Path) -> None:
    source = _released(tmp_path, "4.5B_base", fps=30, window=2, text_scales="3", chunk_scales="1,1,2,2,1")
    runtime = source.config.runtime_config
    assert (runtime.fps, runtime.window_size) == (30, 2)
    assert (runtime.text_scales, runtime.prev_chunk_scales) == ((3,) * 5, (1, 1, 2, 2, 1))
    shorter = _released(tmp_path, "4.5B_base", guidance_times="0,0.3", text_scales="5,1", chunk_scales="1")
    assert shorter.config.runtime_config.cfg_t_range == (0, 0.3)
    assert shorter.config.runtime_config.prev_chunk_scales == (1, 1)
    text = _released(tmp_path, "4.5B_distill", special="3d,hq", negative=True, copy_weight=0.9, t5_dtype="bfloat16")
    assert (text.text.special, text.text.negative, text.text.dtype) == (("HQ", "3D"), True, "bfloat16")
    assert text.copy_weight == 0.9
    assert _released(tmp_path, "4.5B_distill").text.special == ("HQ", "DURATION")
    assert _released(tmp_path, "4.5B_distill", special="none").text.special == ()
    plain = _released(tmp_path, "4.5B_distill")
    assert len({str(one.identity) for one in (source, shorter, text, plain)}) == 4


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("4.5B_base", {"text_scales": "3,2"}, "--text-scales has 2 numbers, but there are 5 times: give 1 or 5"),
        ("4.5B_base", {"text_scales": "much"}, "--text-scales much is not a list of numbers"),
        ("4.5B_base", {"chunk_scales": "nan"}, "--chunk-scales nan has a number that is not finite"),
        ("4.5B_base", {"guidance_times": "0,0.5"}, "has 5 numbers, but there are 2 times"),
        ("4.5B_distill", {"text_scales": "3"}, "--text-scales is for models with guidance, this one is distilled"),
        ("4.5B_distill", {"special": "HQ,4D"}, "--special HQ,4D: '4D' is not known: choose from HQ,"),
        ("4.5B_distill", {"window": 3}, "8 steps do not divide into the window of 3 chunks"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, name: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        _released(tmp_path, name, **given)


@pytest.mark.parametrize("given", [{"special": "HQ"}, {"negative": True}, {"t5_dtype": "bfloat16"}])
def test_a_model_without_t5_has_no_text_settings(options: Options, given: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(given)).replace('_', '-')} is for models that read prompts"):
        _plan(options, **given)


def test_prompts_of_later_parts_belong_to_the_chunk_in_which_they_begin(options: Options, tmp_path: Path) -> None:
    story = tmp_path / "story.json"
    story.write_text(json.dumps({"4": "a green square moving up", "2.5s": OTHER}))
    plan = _plan(options, script=story, prompt_at=["3s a blue circle moving left"], seconds=5)
    assert plan.request.script == ((2, OTHER), (3, "a blue circle moving left"), (4, "a green square moving up"))
    prompts = (PROMPT, OTHER, "a blue circle moving left", "a green square moving up")
    assert plan.model.source.loader.text.prompts == prompts  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["0.9s " + OTHER], "0.9s is in the first chunk of 1 s, which PROMPT is for"),
        (["soon " + OTHER], "'soon' is no time: write seconds, such as 4s"),
        (["2s"], "there is no prompt for 2s"),
        (["2s " + OTHER, "2.2s " + PROMPT], "there are two prompts for the chunk at 2.2s"),
        (["9s " + OTHER], "begins after the end of the video: ask for more --seconds"),
        (["2s a purple circle"], "purple"),
    ],
)
def test_later_prompts_that_cannot_be_used(options: Options, given: list[str], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        _plan(options, prompt_at=given, seconds=5)


@pytest.mark.parametrize("content", ["[]", '{"2s": 3}', "{", '{"2s": "  "}'])
def test_a_damaged_script_is_one_line(options: Options, tmp_path: Path, content: str) -> None:
    (tmp_path / "story.json").write_text(content)
    with pytest.raises(InputError):
        _plan(options, script=tmp_path / "story.json", seconds=5)

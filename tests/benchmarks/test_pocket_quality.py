"""The measuring is held against clips whose truth is known: drawn ones, and drawn ones that were spoilt."""

import csv
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.adherence import Adherence, adherence, direction, fit_line, scene_of, wrap
from benchmarks.common import run_command
from benchmarks.pocket_quality import contact_sheet, measure, percentile, report, run, verdicts
from benchmarks.workload import balanced_scenes, pocket_requests
from models.errors import InputError
from models.pocket.clips import RADIUS, SIDE, SPEED, Objects, draw_background, render
from models.pocket.words import COLOURS, MOTIONS, RESTS, SHAPES, Scene

SCENES = [Scene(colour=c, shape=s, motion=m) for c, s, m in product(COLOURS, SHAPES, MOTIONS)]
RED_CIRCLE = Scene(colour="red", shape="circle", motion="right")


def as_drawn(video: Tensor) -> Tensor:
    """[3, F, S, S] in -1..1 -> uint8 [F, S, S, 3]."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def clip(scene: Scene, *, seed: int = 0, start: tuple[float, float] = (10.3, 50.8), frames: int = 96) -> Tensor:
    background = draw_background(1, torch.Generator().manual_seed(seed))
    objects = Objects(
        colour=torch.tensor([[list(COLOURS).index(scene.colour)]]),
        shape=torch.tensor([[SHAPES.index(scene.shape)]]),
        motion=torch.tensor([[list(MOTIONS).index(scene.motion)]]),
        position=torch.tensor(start).reshape(1, 1, 2),
        velocity=SPEED * torch.tensor(MOTIONS[scene.motion]).float().reshape(1, 1, 2),
        radius=torch.full((1, 1), RADIUS),
    )
    return as_drawn(render(objects, background, frames)[0])


def assert_true_to(scene: Scene, measured: Adherence) -> None:
    assert (measured.colour, measured.motion, measured.shape) == (scene.colour, scene.motion, scene.shape)
    assert math.dist(measured.velocity, MOTIONS[scene.motion]) < 0.01
    assert set(measured.chunk_motions) == {scene.motion}
    assert max(measured.boundary_errors) < 0.3 and measured.deviation < 0.3
    assert measured.whole and measured.overlap > 0.95 and measured.stray < 0.001 and measured.found == 1
    assert 0.95 < measured.chunk_seam < 1.05 and 0.95 < measured.tile_seam < 1.05


@pytest.mark.parametrize("colour", COLOURS)
def test_every_scene_as_drawn_is_right(colour: str):
    for i, scene in enumerate(scene for scene in SCENES if scene.colour == colour):
        assert_true_to(scene, adherence(clip(scene, seed=i, start=(7.7 * i, 31.1 * i), frames=48), scene))


place = st.floats(0, SIDE, exclude_max=True)


@settings(max_examples=12, deadline=None)
@given(scene=st.sampled_from(SCENES), start=st.tuples(place, place), seed=st.integers(0, 10_000))
def test_any_start_and_background_as_drawn_is_right(scene: Scene, start: tuple[float, float], seed: int):
    assert_true_to(scene, adherence(clip(scene, seed=seed, start=start), scene))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("boundary", "axis"), [(24, 1), (48, 2), (72, 1)])
def test_a_jump_at_a_boundary_is_measured_there_and_nowhere_else(shape: str, boundary: int, axis: int):
    scene = Scene(colour="green", shape=shape, motion="left")
    frames = clip(scene)
    frames[boundary:] = frames[boundary:].roll(6, dims=axis)
    measured = adherence(frames, scene)
    expected = [6.0 if at == boundary else 0.0 for at in (24, 48, 72)]
    assert measured.boundary_errors == pytest.approx(expected, abs=0.1)
    assert measured.motion_right and measured.chunk_seam > 1.3 and measured.deviation > 2


def test_an_object_that_stops_at_a_boundary_is_an_error_of_the_way_it_misses():
    frames = clip(RED_CIRCLE, frames=48)
    frames[24:] = frames[23]
    assert adherence(frames, RED_CIRCLE).boundary_errors == pytest.approx([2.5], abs=0.05)  # mean of 1, 2, 3, 4


def test_an_object_that_turns_back_half_way_moves_in_no_direction():
    frames = clip(RED_CIRCLE)
    frames[48:] = frames[48:].flip(0)
    measured = adherence(frames, RED_CIRCLE)
    assert not measured.motion_right
    assert measured.chunk_motions == ("right", "right", "left", "left")
    assert measured.boundary_errors[1] > 10


@pytest.mark.parametrize("word", ["colour", "shape", "motion"])
def test_another_word_than_the_prompts_is_wrong_and_the_rest_right(word: str):
    others = {"colour": "yellow", "shape": "cross", "motion": "up"}
    shown = Scene(**{key: others[key] if key == word else getattr(RED_CIRCLE, key) for key in others})
    measured = adherence(clip(shown), RED_CIRCLE)
    right = {"colour": measured.colour_right, "shape": measured.shape_right, "motion": measured.motion_right}
    assert right == {key: key != word for key in others}
    assert getattr(measured, word) == others[word]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("apart", [(14, 0), (20, 10), (32, 32)])
def test_a_doubled_object_is_not_whole(shape: str, apart: tuple[int, int]):
    scene = Scene(colour="magenta", shape=shape, motion="down")
    frames = clip(scene)
    double = frames.roll(apart, dims=(1, 2))
    coloured = double.float().amax(-1) - double.float().amin(-1) > 40
    measured = adherence(torch.where(coloured[..., None], double, frames), scene)
    assert not measured.whole and measured.stray > 0.1 and measured.overlap < 0.7


@pytest.mark.parametrize("shape", SHAPES)
def test_a_blurred_object_keeps_colour_and_motion_but_is_not_whole(shape: str):
    scene = Scene(colour="blue", shape=shape, motion="up")
    kernel = torch.exp(-(torch.arange(-9, 10) ** 2) / (2 * 3.0**2))
    kernel /= kernel.sum()
    planes = torch.nn.functional.pad(clip(scene).permute(0, 3, 1, 2).float(), (9, 9, 9, 9), mode="circular")
    rows = torch.nn.functional.conv2d(planes.flatten(0, 1)[:, None], kernel.reshape(1, 1, -1, 1))
    blurred = torch.nn.functional.conv2d(rows, kernel.reshape(1, 1, 1, -1)).reshape(-1, 3, SIDE, SIDE)
    measured = adherence(blurred.round().to(torch.uint8).permute(0, 2, 3, 1), scene)
    assert measured.colour_right and measured.motion_right and max(measured.boundary_errors) < 0.3
    assert measured.overlap < 0.78 and not measured.whole


@pytest.mark.parametrize("shape", SHAPES)
def test_a_little_noise_changes_no_verdict(shape: str):
    scene = Scene(colour="cyan", shape=shape, motion="still")
    frames = clip(scene).float()
    noise = 8 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    measured = adherence((frames + noise).clamp(0, 255).to(torch.uint8), scene)
    assert measured.colour_right and measured.motion_right and measured.whole
    assert max(measured.boundary_errors) < 0.3


@pytest.mark.parametrize("kind", ["noise", "grey"])
def test_frames_without_an_object_are_right_for_no_prompt(kind: str):
    frames = torch.full((96, SIDE, SIDE, 3), 128, dtype=torch.uint8)
    if kind == "noise":
        frames.random_(0, 256, generator=torch.Generator().manual_seed(1))
    for motion in MOTIONS:
        measured = adherence(frames, Scene(colour="red", shape="circle", motion=motion))
        assert measured.motion is None and measured.shape is None and measured.found == 0
        assert measured.boundary_errors == (math.inf,) * 3 and measured.stray == 1 and not measured.whole
    assert measured.colour is None or measured.colour_share < 0.25


def test_an_object_that_vanishes_makes_its_boundary_infinite():
    frames = clip(RED_CIRCLE)
    frames[46:52] = 128
    measured = adherence(frames, RED_CIRCLE)
    assert measured.boundary_errors[1] == math.inf
    assert measured.boundary_errors[0] < 0.3 and measured.boundary_errors[2] < 0.3
    assert measured.found == pytest.approx(90 / 96)


@pytest.mark.parametrize(("first", "kind"), [(24, "chunk_seam"), (12, "tile_seam")])
def test_steps_in_brightness_show_as_seams_of_their_kind(first: int, kind: str):
    frames = clip(RED_CIRCLE)
    for boundary in range(first, 96, 24):
        frames[boundary:] += 6
    measured = adherence(frames, RED_CIRCLE)
    seams = {"chunk_seam": measured.chunk_seam, "tile_seam": measured.tile_seam}
    assert seams.pop(kind) > 2
    assert max(seams.values()) < 1.1


@given(
    velocity=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    origin=st.tuples(place, place),
    wrong=st.sets(st.integers(0, 23), max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_a_line_is_found_across_the_boundary_in_spite_of_outliers(velocity, origin, wrong):
    times = torch.arange(24.0)
    centres = torch.tensor(origin) + torch.tensor(velocity) * times[:, None]
    for i in wrong:
        centres[i] += 5
    line = fit_line(times, torch.remainder(centres, SIDE))
    truth = torch.tensor(origin) + torch.tensor(velocity) * times[:, None]
    assert wrap(line.at(times) - truth).abs().max() < 2.5  # the outliers are 5 off
    if not wrong:
        assert line.velocity.tolist() == pytest.approx(velocity, abs=1e-3)


@pytest.mark.parametrize(
    ("velocity", "name"),
    [
        ((1.0, 0.0), "right"),
        ((-0.6, 0.3), "left"),
        ((0.1, -1.2), "up"),
        ((-0.2, 0.9), "down"),
        ((0.1, 0.2), "still"),
        ((0.4, 0.0), None),
        ((0.7, 0.6), None),
    ],
)
def test_directions_have_names_and_gaps_between_them(velocity, name):
    assert direction(torch.tensor(velocity)) == name


def test_sixty_scenes_are_all_different_and_even_over_the_words():
    scenes = balanced_scenes(60, seed=3)
    assert len(set(scenes)) == 60
    for word, known, times in (("colour", COLOURS, 10), ("shape", SHAPES, 15), ("motion", MOTIONS, 12)):
        assert Counter(getattr(scene, word) for scene in scenes) == dict.fromkeys(known, times)
    assert set(balanced_scenes(120, seed=3)) == set(SCENES)
    assert scenes == balanced_scenes(60, seed=3) != balanced_scenes(60, seed=4)


def test_percentiles_take_infinite_values():
    assert percentile([3.0, 1.0, math.inf, 2.0], 0.75) == 3
    assert percentile([3.0, 1.0, math.inf, 2.0], 0.9) == math.inf


def test_figures_fail_each_at_its_own_threshold():
    good, jumping = clip(RED_CIRCLE), clip(RED_CIRCLE)
    for boundary in (24, 48, 72):
        jumping[boundary:] = jumping[boundary:].roll(6, dims=1)
    yellow = clip(Scene(colour="yellow", shape="circle", motion="right"))
    still = clip(Scene(colour="red", shape="circle", motion="still"))

    wrong_way = clip(Scene(colour="red", shape="circle", motion="left"))
    square = clip(Scene(colour="red", shape="square", motion="right"))

    figures = cache(lambda video: adherence(video, RED_CIRCLE))

    def failed(*videos: Tensor, compressed: Tensor = good) -> set[str]:
        found = verdicts([figures(video) for video in videos], {2: [figures(compressed)]})
        return {one.name for one in found if one.passed is False}

    pace, jumps = "steps between frames at the right pace", "error after a chunk boundary, median"
    assert not failed(good, good)
    assert failed(good, yellow) == {"colour right"}
    assert failed(good, still) == {"direction right", pace}
    assert failed(good, jumping, jumping) == {jumps, "change at chunk boundaries over that inside, median"}
    assert failed(good, square) == {"shape right", "one whole object of the right shape"}
    assert failed(good, compressed=wrong_way) == {"direction right, KV budget 2"}
    assert not failed(*[good] * 49, yellow)  # 98% is enough
    assert not failed(*[good] * 9, square) - {"one whole object of the right shape"}  # 90% is enough
    nothing = failed(torch.full_like(good, 128))
    assert {"colour right", "direction right", "shape right", pace, jumps} <= nothing


@pytest.mark.parametrize(("pace", "paced"), [("", 1.0), ("fast", 0.0)])
def test_the_pace_is_that_of_the_prompt(pace: str, paced: float):
    scene = Scene(colour="red", shape="circle", motion="right", pace=pace)
    assert adherence(clip(RED_CIRCLE), scene).paced == pytest.approx(paced, abs=0.02)


def test_nothing_is_said_of_the_pace_of_what_rests():
    assert math.isnan(adherence(clip(RED_CIRCLE), replace(RED_CIRCLE, pace=RESTS)).paced)


def test_jerks_are_not_the_right_pace():
    jerking = clip(RED_CIRCLE).unflatten(0, (-1, 4))[:, :1].expand(-1, 4, -1, -1, -1).flatten(0, 1).contiguous()
    measured = adherence(jerking, RED_CIRCLE)
    assert measured.motion_right and measured.paced < 0.1


def test_a_panorama_cannot_be_measured():
    with pytest.raises(InputError, match="no single object"):
        scene_of("panning right")


def test_true_clips_pass_and_leave_all_results(tmp_path, capsys):
    scenes = balanced_scenes(4, seed=0)
    strips = measure([(scene.prompt, clip(scene, frames=48), 0.5) for scene in scenes], 4)
    assert report(tmp_path, strips, "clips") == 0
    assert capsys.readouterr().out.count("PASS") == 7
    rows = list(csv.DictReader((tmp_path / "pocket_quality.csv").open()))
    assert [row["prompt"] for row in rows] == [scene.prompt for scene in scenes]
    assert {row["whole"] for row in rows} == {"True"} and float(rows[0]["boundary_error_max"]) < 0.3
    assert "| colour right" in (tmp_path / "pocket_quality.md").read_text()
    assert (tmp_path / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    (axes,) = contact_sheet(strips, "clips").axes
    assert axes.images[0].get_array().shape == (4 * 68, 6 * 68, 3)  # three frames of each chunk, and gaps
    assert len(axes.collections) == 1, "one boundary"


def test_clips_that_do_not_follow_their_prompt_fail(tmp_path, capsys):
    strips = measure([("a green circle moving right", clip(RED_CIRCLE, frames=48), 0.5)], 1)
    assert report(tmp_path, strips, "clips") == 1
    assert capsys.readouterr().out.count("FAIL") == 1


def test_videos_of_two_runs_share_no_noise():
    seeds = [one.seed for seed in (0, 1) for one in pocket_requests(60, chunks=2, num_steps=4, seed=seed)]
    assert len(set(seeds)) == 120


def test_videos_of_an_untrained_model_are_made_and_fail(tmp_path, untrained_weights):
    options = [*"--prompts 2 --chunks 2 --seed 7 --kv-budget 1".split(), "--weights", str(untrained_weights)]
    assert run_command(run, "pocket_quality", [*options, "--out", str(tmp_path)]) == 1
    rows = list(csv.reader((tmp_path / "pocket_quality.csv").open()))
    assert [row[0] for row in rows[1:]] == [scene.prompt for scene in balanced_scenes(2, seed=7)]

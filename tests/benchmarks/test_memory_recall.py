"""The measuring is held against panoramas whose truth is known: drawn ones, and drawn ones that were spoilt."""

import csv
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.common import run_command
from benchmarks.memory_recall import (
    RANGE,
    WHOLE,
    Case,
    Made,
    Recall,
    best,
    cases,
    landmarks,
    recall,
    report,
    run,
    slit_scan,
)
from models.pocket.clips import SIDE, WORLD, draw_panoramas
from models.pocket.words import SHAPES

TURNS = 2


def drawn(seed: int, frames: int, shape: str | None = None) -> Tensor:
    """A slit scan of a drawn world, uint8 [S, F, 3]; its landmarks are all of one shape if that is given."""
    world = draw_panoramas(1, torch.Generator().manual_seed(seed))
    if shape is not None:
        every = torch.full_like(world.objects.shape, SHAPES.index(shape))
        world = replace(world, objects=replace(world.objects, shape=every))
    video = ((world.frames(frames)[0] + 1) * 127.5).round().to(torch.uint8)
    return slit_scan(video.permute(1, 2, 3, 0))


@cache
def turns(shape: str | None = None) -> Tensor:
    """Three turns of one world and a bit more, drawn once and repeated."""
    one = drawn(1, WORLD, shape)
    return torch.cat([one] * (TURNS + 1) + [one[:, :SIDE]], dim=1)


def measured(picture: Tensor) -> list[Recall]:
    found = landmarks(picture)
    return [recall(found, turn) for turn in range(1, TURNS + 1)]


@pytest.mark.parametrize("seed", [0, 2])
def test_all_of_a_drawn_world_comes_back(seed: int):
    for one in measured(drawn(seed, (TURNS + 1) * WORLD + SIDE)):
        assert one.seen == one.again == one.found >= 4, "what the first frame cuts off is not counted"
        assert one.share == 1


def test_landmarks_of_another_colour_have_not_come_back():
    true, spoilt = turns(), turns().clone()
    spoilt[:, WORLD : 2 * WORLD] = true[:, WORLD : 2 * WORLD].roll(1, dims=-1)
    first, second = measured(spoilt)
    assert first.again <= 1 and first.seen == measured(true)[0].seen and second.share == 1


@pytest.mark.parametrize(("by", "back"), [(3, True), (6, False)])
@pytest.mark.parametrize("axis", [0, 1])
def test_landmarks_may_be_four_pixels_off(by: int, back: bool, axis: int):
    true, spoilt = turns(), turns().clone()
    if axis:
        spoilt[:, WORLD + by :] = true[:, WORLD:-by]
    else:
        spoilt[:, WORLD:] = true[:, WORLD:].roll(by, dims=0)
    for one in measured(spoilt):
        assert one.again >= one.seen - 1 if back else one.again <= 1


def test_a_missing_landmark_is_missed_and_another_one_invented():
    true, spoilt = turns(), turns().clone()
    found = [one for one in landmarks(true) if WORLD <= one.x < 2 * WORLD]
    seen, at = measured(true)[0].seen, round(found[2].x)
    spoilt[:, at - 16 : at + 16] = 128
    assert measured(spoilt)[0] == Recall(seen=seen, again=seen - 1, found=seen - 1)
    assert measured(spoilt)[1].share == 1
    spoilt[:, at - 16 : at + 16] = true[:, at - 16 : at + 16].roll(20, dims=0)
    assert measured(spoilt)[0] == Recall(seen=seen, again=seen - 1, found=seen)


def test_another_outline_at_the_same_place_has_not_come_back():
    squares, crosses = turns("square").clone(), turns("cross")
    squares[:, WORLD : 2 * WORLD] = crosses[:, WORLD : 2 * WORLD]
    first, second = measured(squares)
    assert first.again <= 1 and second.share == 1


def test_a_grey_world_has_nothing_to_remember():
    one = recall(landmarks(torch.full((SIDE, 3 * WORLD, 3), 128, dtype=torch.uint8)), 1)
    assert (one.seen, one.found) == (0, 0) and one.share != one.share


def made(case: Case, again: int) -> Made:
    each = tuple(Recall(seen=10, again=again, found=10) for _ in range(TURNS))
    return Made(case=case, panorama=turns(), mirrored=False, recalls=each, kv_bytes=10**6, seconds=0.5)


@pytest.mark.parametrize(("whole", "own", "status"), [(9, 1, 0), (10, 1, 1), (9, 5, 1)])
def test_the_best_score_is_held_against_the_whole_history_and_the_own_range(tmp_path, capsys, whole, own, status):
    even = Case(budget=4, score="even", retention="frame")
    found = [made(WHOLE, whole), made(RANGE, own), made(Case(budget=4), 3), made(even, 7 + (own > 1) + (whole < 10))]
    assert best(found, 4) == even
    assert report(tmp_path, found, "drawn") == status
    assert capsys.readouterr().out.count("FAIL") == status
    rows = list(csv.DictReader((tmp_path / "memory_recall.csv").open()))
    assert [row["after_2"] for row in rows[:2]] == [f"{whole / 10:g}", f"{own / 10:g}"]
    for name in ("panoramas", "recall_over_bytes", "recall_over_turns"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_cases_differ():
    assert len(set(cases([1, 2, 4]))) == len(cases([1, 2, 4])) == 29


@pytest.mark.slow
def test_the_command_makes_panoramas(tmp_path, untrained_weights):
    options = ["--quick", "--weights", str(untrained_weights), "--out", str(tmp_path)]
    assert run_command(run, "memory_recall", options) == 0
    rows = list(csv.DictReader((tmp_path / "memory_recall.csv").open()))
    assert [row["memory"] for row in rows] == ["whole history", "own range", "budget 1"]
    sizes = [float(row["KV_MB"]) for row in rows]
    assert sizes[0] > 2 * sizes[1] and sizes[0] > 2 * sizes[2]

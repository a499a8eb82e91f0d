"""Long videos, and what short and long ones are held to."""

from dataclasses import replace

import pytest
import torch

from benchmarks.common import run_command
from benchmarks.memory import LongVideo, make_long_video, run, verdicts

MIB = 2**20
SHORT = LongVideo(
    chunks=20,
    budget=2,
    kv_bytes=3 * MIB,
    warm_rss=400 * MIB,
    end_rss=401 * MIB,
    peak_rss=420 * MIB,
    early=0.2,
    late=0.2,
)
LONG = replace(SHORT, chunks=600, end_rss=405 * MIB, peak_rss=425 * MIB, late=0.205)


@pytest.mark.slow
def test_a_video_of_any_length_holds_the_bytes_of_its_budget():
    made = [make_long_video(chunks, 1, torch.get_num_threads()) for chunks in (6, 7)]
    rows, layers, row = (1 + 4) * 96, 6, 2 * 2 * 48 * 4  # budget and window; keys and values of 2 heads of 48, fp32
    bookkeeping = 50 * 4 * 48 * 4 + rows * 2 * 4  # the queries that ask, and where each row's two keys came from
    assert made[0].kv_bytes == made[1].kv_bytes == layers * (rows * row + bookkeeping)
    for one in made:
        assert one.early > 0 and one.late > 0
        assert 100 * MIB < one.warm_rss <= one.peak_rss and one.end_rss <= one.peak_rss


def test_a_longer_video_that_takes_no_more_passes():
    assert [one.passed for one in verdicts(SHORT, LONG)] == [True] * 4


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"kv_bytes": 3 * MIB + 4}, 0),
        ({"peak_rss": 429 * MIB}, 1),
        ({"end_rss": 408 * MIB}, 2),
        ({"late": 0.212}, 3),
    ],
)
def test_each_figure_fails_for_itself(changes, which):
    assert [one.passed for one in verdicts(SHORT, replace(LONG, **changes))] == [at != which for at in range(4)]


@pytest.mark.parametrize("lengths", [("20", "20"), ("4", "60"), ("60", "10")])
def test_lengths_that_cannot_be_compared_are_refused(tmp_path, capsys, lengths):
    assert run_command(run, "memory", ["--chunks", *lengths, "--out", str(tmp_path)]) == 2
    assert f"lengths {lengths[0]} and {lengths[1]}" in capsys.readouterr().err

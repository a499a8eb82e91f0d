"""Time and memory of the scores, at small sizes."""

import csv
import os

import pytest
import torch

from benchmarks.common import in_fresh_process, peak_rss, reset_peak, rss, run_command
from benchmarks.kv_compression import Measured, measure, naive_redundancy, report, run, structured_keys
from engine.kv.selection import redundancy
from models.errors import InputError

MIB = 2**20


def test_the_naive_form_is_equation_11():
    keys = structured_keys(40)[:, :2]
    unit = torch.nn.functional.normalize(keys, dim=-1)
    expected = torch.empty(2, 40)
    for head in range(2):
        for i in range(40):
            expected[head, i] = sum(float(unit[i, head] @ unit[j, head]) for j in range(40) if j != i) / 40
    assert torch.allclose(naive_redundancy(keys), expected.softmax(-1), rtol=1e-5, atol=0)


def test_the_keys_score_differently_enough_to_tell_forms_apart():
    scores = redundancy(structured_keys(1200))
    assert (scores.amax(-1) / scores.amin(-1)).min() > 1.2


@pytest.mark.slow
def test_the_forms_agree_and_the_naive_one_takes_its_matrix():
    naive = in_fresh_process(measure, "naive", 5000, 1)
    linear = measure("linear", 5000, torch.get_num_threads())
    assert torch.allclose(naive.scores, linear.scores, rtol=1e-5, atol=0)
    matrix = 4 * 5000**2
    assert 0.9 * matrix < naive.peak < 1.5 * matrix
    assert naive.seconds > linear.seconds > 0


@pytest.mark.parametrize(("seconds", "off", "status"), [(0.01, 0.0, 0), (0.1, 0.0, 1), (0.01, 1e-4, 1)])
def test_the_status_says_whether_the_linear_form_is_fast_and_exact(tmp_path, capsys, seconds, off, status):
    scores = torch.tensor([[0.2, 0.8]])
    measured = {
        "naive": Measured(seconds=1.0, peak=MIB, scores=scores),
        "linear": Measured(seconds=seconds, peak=MIB, scores=scores * (1 + off)),
        "selection": Measured(seconds=0.1, peak=MIB, scores=None),
    }
    assert report(tmp_path, 300, measured) == status
    assert capsys.readouterr().out.count("FAIL") == status


@pytest.mark.slow
def test_the_command_writes_everything(tmp_path, capsys):
    assert run_command(run, "kv", ["--keys", "300", "--out", str(tmp_path)]) in (0, 1)  # at this size both take no time
    assert "17.8" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "kv_compression.csv").open()))
    assert [row["what"] for row in rows][:3] == ["redundancy, naive", "redundancy, linear", "whole selection"]
    assert (tmp_path / "kv_compression.md").read_text().startswith("# Scoring")


def test_a_fresh_process_is_another_one_and_its_end_is_noticed():
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(InputError, match="killed"):
        in_fresh_process(os._exit, 9)


def test_memory_that_was_used_in_between_shows_in_the_peak_only():
    if not reset_peak():
        pytest.skip("this system cannot set the peak back")
    before = rss()
    bytearray(64 * MIB)[::4096] = bytes(64 * MIB // 4096)
    assert peak_rss() >= before + 60 * MIB
    assert rss() < before + 30 * MIB

"""Layouts that are not at hand: times and bytes from shapes, the tables, and the check's verdict."""

import csv
from dataclasses import replace

import pytest

from benchmarks.common import run_command
from benchmarks.simulate.__main__ import run
from benchmarks.simulate.layouts import Cluster, Reuse, Study, layouts_on, reuse_of_record, run_study, sampled_reuse
from engine.record import Recorder
from engine.reuse.policy import Decision, Observation
from engine.schedule import Timetable
from models.errors import InputError
from models.magi.presets import PRESETS, find_preset
from parallel.mesh import Layout


def cluster(**changes):
    config = find_preset("magi-4.5b-distill").config()
    return Cluster(config=config, **changes)


def study(**changes):
    layouts = (Layout(), Layout(pp=2), Layout(pp=4, cp=2), Layout(pp=8))
    return replace(Study(cluster=cluster(), chunks=5, steps=16, layouts=layouts, concurrency=(1, 8)), **changes)


def one_pass(*, oldest=False, last=False):
    return study().sampling(lean=False).step_passes(15 if last else 0, oldest=oldest, text_needed=False)[-1]


def test_bytes_are_those_of_the_shapes():
    one = cluster()
    assert one.tokens == 6 * 45 * 45
    assert one.hidden_bytes == 12150 * 3072 * 2  # 75 MB
    assert one.velocity_bytes == 16 * 6 * 90 * 90 * 4
    assert one.exchange_bytes(2) == pytest.approx(12150 / 2 * (2 * 1024 + 2 * 3072) * 2 / 2)
    assert 4 < one.attended < 5


def test_the_papers_operations_come_out():
    """306 PFLOP for 10 chunks of 64 steps with the whole past attended to; here with 4.6 chunks of it for all."""
    whole = study(chunks=10, steps=64)
    assert whole.cluster.petaflops(whole.plan(None, Layout())) == pytest.approx(306, rel=0.15)


def test_one_gpu_takes_what_a_pass_takes():
    assert cluster().seconds(Layout())(one_pass(), 0) == pytest.approx((3.6,))
    copy = cluster().seconds(Layout())(one_pass(oldest=True, last=True), 15)
    assert 1 < copy[0] < 2  # attends to itself alone


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_stages_share_the_layers(pp):
    seconds = cluster().seconds(Layout(pp=pp))(one_pass(), 0)
    assert sum(seconds) == pytest.approx(3.6)
    assert max(seconds) == pytest.approx(3.6 * -(-34 // pp) / 34)


def test_cp_divides_computing_and_adds_exchanges():
    one = cluster()
    assert one.exchange_seconds(1) == 0
    (two,) = one.seconds(Layout(cp=2))(one_pass(), 0)
    assert two == pytest.approx(3.6 / (2 * 0.95) + 34 * one.exchange_seconds(2), rel=0.01)
    (free,) = cluster(doubling=1.0, bandwidth=1e18, collective=0.0).seconds(Layout(cp=4))(one_pass(), 0)
    assert free == pytest.approx(0.9)


def test_memory_is_that_of_the_fullest_rank():
    preset, one = PRESETS["magi-4.5b-distill"], cluster()
    (weights, kv), (half, _), vae = one.held(Layout()), one.held(Layout(pp=2)), 2 * preset.vae_parameters
    assert weights - vae == pytest.approx(preset.stored, rel=0.001)
    assert half - vae == pytest.approx(preset.stored / 2, rel=0.02)
    assert kv == (5 + 4) * 12150 * 34 * 2 * 1024 * 2
    assert one.held(Layout(pp=2, cp=4))[1] == kv // 8
    assert one.held(Layout(pp=8))[1] == kv * 5 // 34
    assert study().rank_bytes(Layout(), 9) == weights + 2 * kv and study().fits(Layout(), 8)
    assert not study(cluster=cluster(memory=1e9)).fits(Layout(), 8)


def test_a_pass_that_is_too_short_for_the_model_is_refused():
    with pytest.raises(InputError, match="too short"):
        _ = cluster(pass_seconds=0.1).attended


def test_layouts_fill_the_gpus():
    config = find_preset("magi-4.5b-distill").config()
    assert {(one.pp, one.cp) for one in layouts_on(config, 4)} == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    assert all(one.cp <= 8 for one in layouts_on(config, 16))


def test_reuse_leaves_the_share_of_the_operations():
    whole = study(chunks=10)
    reuse = sampled_reuse(whole, 0.6)
    plans = [whole.plan(flags, Layout()).total for flags in reuse.flags]
    assert plans[0] / whole.plan(None, Layout()).total == pytest.approx(0.6, abs=0.02)
    assert 0.6 < reuse.computed < 0.75  # clean and copy passes are gone besides


def test_the_reuse_of_a_record_is_taken(tmp_path):
    trace, recorded = Recorder(), study(chunks=3).schedule
    trace.begin(Timetable(spans=(recorded,)))
    for tick in recorded:
        for chunk, step in tick.active:
            seen = Observation(chunk=chunk, step=step, tick=tick.index, final=False, change=None, scale=None)
            trace.decided(seen, Decision.REUSE if step % 2 else Decision.COMPUTE)
    trace.finish({"prompt": "a red circle"}).save(tmp_path / "run")
    reuse = reuse_of_record(study(), tmp_path / "run")
    assert reuse.name == "record run" and reuse.computed == 0.5
    assert study().plan(reuse.flags[0], Layout()).calls == 5 * 8
    with pytest.raises(InputError, match="give --steps 16"):
        reuse_of_record(study(steps=32), tmp_path / "run")


def test_many_videos_fill_what_one_leaves_idle():
    whole = study()
    runs = {(run.layout, run.videos): run for run in run_study(whole, [Reuse(name="none")])}
    assert runs[Layout(), 1].speed_up == pytest.approx(1, abs=0.01)
    assert runs[Layout(), 1].gangs == 1 and runs[Layout(), 8].gangs == 8
    assert runs[Layout(), 8].speed_up == pytest.approx(8, rel=0.01)
    assert runs[Layout(pp=8), 8].speed_up > 1.5 * runs[Layout(pp=8), 1].speed_up
    for made in runs.values():
        assert made.speed_up < 8 and max(made.utilisation) <= 1


def test_the_command_writes_tables(tmp_path):
    arguments = ["--quick", "--steps", "16", "--gpus", "4", "--out", str(tmp_path)]
    assert run_command(run, "simulate", arguments) == 0
    text = (tmp_path / "simulate.md").read_text()
    assert "pp 2 x cp 2" in text and "pp 8" not in text
    rows = list(csv.DictReader((tmp_path / "simulate.csv").read_text().splitlines()))
    assert len(rows) == 3 * 6 * 2  # kinds of reuse, layouts, concurrencies
    assert {row["reuse"] for row in rows} == {"no reuse", "reuse 0.53", "reuse 0.46"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "magi-5b"], "unknown model"),
        (["--steps", "17"], "17 steps"),
        (["--record", "nowhere"], "no record"),
        (["--steps", "8"], "cannot be had"),
        (["--pass-seconds", "0"], "--pass-seconds"),
        (["--concurrency", "0"], "concurrency"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, said):
    assert run_command(run, "simulate", [*arguments, "--quick", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1

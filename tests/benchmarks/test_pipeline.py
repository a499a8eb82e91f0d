"""Ranks against one process: counts that are worked out, tables and verdicts, and one small run of it all."""

from dataclasses import replace

import pytest
import torch

from benchmarks.common import run_command
from benchmarks.pipeline import Gang, barrier_rows, flag_digest, layouts_for, problems, run, verdicts
from benchmarks.runs import make_alone, on_ranks, reuse_for
from benchmarks.workload import QUICK, Made, ModelSpec, Workload, build, model_config
from engine.reuse.policy import ReuseSettings
from parallel.comm.messages import HEADER_BYTES
from parallel.mesh import Layout
from parallel.split import balanced_split, stage_layers
from parallel.trace import RankCounters

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ModelSpec(layers=3, width=192, side=32)
PLAIN = Workload(model=SPEC, chunks=2, steps=8)
FLOWCACHE = ReuseSettings(policy="flowcache", threshold=0.5, warmup_steps=2, clean_pass=False, copy_pass=False)
CALLS, CONTEXT_FREE, TOKENS = 2 * 8 + 1, 4, 6 * 2 * 2


def test_a_stage_has_the_weights_of_the_whole():
    whole = build(SPEC).model.state_dict()
    seen = set()
    for stage in range(2):
        part = build(SPEC, stage_layers(balanced_split([1.0] * 3, 2), stage)).model.state_dict()
        assert all(torch.equal(part[name], whole[name]) for name in part)
        seen |= set(part)
    assert seen == set(whole)


def test_gangs_are_those_that_the_ranks_allow():
    config = model_config(SPEC)
    assert layouts_for(config, 1) == [Layout()]
    assert set(layouts_for(config, 2)) == {Layout(), Layout(pp=2), Layout(cp=2)}
    assert Layout(pp=4) not in layouts_for(config, 8)  # of three layers
    assert Layout(pp=2, cp=4) in layouts_for(config, 8)


def test_reuse_computes_about_half_of_the_steps():
    quick = Workload(model=QUICK, chunks=4, steps=8)
    made = make_alone(replace(quick, reuse=reuse_for(QUICK)), build(QUICK))
    assert made.computed == pytest.approx(0.55, abs=0.06)


def counts(layout):
    """What every rank of a gang must report for `PLAIN`, worked out by hand."""
    calls, returning = CALLS + CONTEXT_FREE, 2 * 8 + CONTEXT_FREE
    hidden = HEADER_BYTES + TOKENS // layout.cp * 192 * 4
    digest = flag_digest(PLAIN.schedule, None)
    made = []
    for rank in range(layout.world_size):
        stage, slot = divmod(rank, layout.cp)
        received = calls * hidden if rank else 0
        if stage == layout.pp - 1 and slot == 0:
            received += returning * (layout.cp - 1) * hidden
        velocity = returning * (HEADER_BYTES + 16 * 6 * 4 * 4 * 4) if layout.pp > 1 and not rank else 0
        made.append(
            RankCounters(
                rank=rank,
                stage=stage,
                cp_rank=slot,
                layers=(0, 3),
                items=calls,
                item_bytes=received,
                velocity_bytes=velocity,
                sent_bytes=10,
                busy=1.5,
                waiting=0.25,
                digests={"0": digest},
            )
        )
    return made


def reported(reports, seconds=2.0):
    return Made(seconds=seconds, latents=(("same",),), ranks=tuple(reports))


ALONE = Made(seconds=3.0, videos=(3.0,), latents=(("same",),))


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(cp=2), Layout(pp=2, cp=2)])
def test_counts_that_are_right_pass(layout):
    assert problems(layout, PLAIN, reported(counts(layout)), ALONE) == []


@pytest.mark.parametrize(
    ("rank", "changes", "said"),
    [
        (1, {"items": 22}, "22 calls, not 21"),
        (0, {"item_bytes": 1}, "1 bytes received"),
        (1, {"item_bytes": 7}, "7 bytes received"),
        (0, {"velocity_bytes": 0}, "0 bytes of velocities"),
        (1, {"digests": {"0": "00"}}, "other flags"),
    ],
)
def test_each_count_that_is_wrong_is_found(rank, changes, said):
    layout = Layout(pp=2)
    reports = counts(layout)
    reports[rank] = replace(reports[rank], **changes)
    (found,) = problems(layout, PLAIN, reported(reports), ALONE)
    assert said in found


def test_other_latents_are_found():
    other = replace(ALONE, latents=(("other",),))
    (found,) = problems(Layout(pp=2), PLAIN, reported(counts(Layout(pp=2))), other)
    assert "latents" in found


LAYOUT = Layout(pp=2)
REPEATS = [reported(counts(LAYOUT), seconds) for seconds in (2.0, 1.9, 2.2)]
BESIDE = [replace(ALONE, videos=(seconds,)) for seconds in (3.6, 3.4, 3.9)]


def gang(workload, seconds, alone):
    made = [reported(counts(LAYOUT), one) for one in seconds]
    beside = [replace(ALONE, videos=(one,)) for one in alone]
    return Gang(layout=LAYOUT, workload=workload, made=made, beside=beside)


def gangs(plain=1.8, reused=1.75, barrier=1.4):
    two = gang(replace(PLAIN, videos=2, reuse=FLOWCACHE), (1.0,), (reused,))
    two.made[0] = replace(two.made[0], flags=(((0, 255), (1, 0), (255, 2)),))
    return [
        gang(PLAIN, (1.0, 1.0, 1.0), (plain, 0.5, 9.0)),
        two,
        gang(replace(PLAIN, barrier=True), (2.0,) * 3, (2 * barrier,) * 3),
    ]


def test_a_gang_puts_repeats_together():
    made = Gang(layout=LAYOUT, workload=PLAIN, made=REPEATS, beside=BESIDE)
    assert made.speed_up == pytest.approx(3.4 / 1.9)
    assert made.utilisation == pytest.approx([1.5 * (1 / 2 + 1 / 1.9 + 1 / 2.2) / 3] * 2)
    assert (made.row["leader_else"], made.row["calls"], made.row["computed"]) == ("0.25", 21, "1.00")
    assert gangs()[1].made[0].computed == 0.5


def test_verdicts_hold_each_figure_for_itself():
    assert [one.passed for one in verdicts(gangs(), [])] == [True, True, True]
    assert [one.passed for one in verdicts(gangs(plain=1.74), [])] == [False, True, True]
    assert [one.passed for one in verdicts(gangs(reused=1.69), [])] == [True, False, True]
    assert [one.passed for one in verdicts(gangs(), ["rank 1: 3 calls, not 4"])] == [True, True, False]
    assert "7 runs" in verdicts(gangs(), [])[-1].measured and "0.50 computed" in verdicts(gangs(), [])[1].name


def test_tables_say_what_was_measured():
    assert gangs()[0].row["of_each"] == "1.80 0.50 9.00"
    assert gang(PLAIN, (2.0,), (3.6,)).row["stages_busy"] == "75% 75%"
    (barrier,) = barrier_rows(gangs())
    assert (barrier["with_a_barrier"], barrier["lost"]) == ("1.40", "50%")
    assert barrier_rows(gangs()[:1]) == []


@pytest.mark.slow
def test_two_ranks_do_the_work_of_one_process():
    workloads = (PLAIN, replace(PLAIN, videos=2, reuse=FLOWCACHE))
    made = on_ranks(LAYOUT, workloads, pings=3)
    alone = [make_alone(workload, build(SPEC)) for workload in workloads]
    for workload, one, other in zip(workloads, made, alone, strict=True):
        assert problems(LAYOUT, workload, one, other) == []
        assert one.flags == other.flags
        assert one.hop > 0 and one.seconds > 0
    assert 0 < made[1].computed < 1 and len(made[1].latents) == 2


@pytest.mark.slow
def test_the_command_writes_everything(tmp_path):
    options = ["--quick", "--ranks", "2", "--chunks", "3", "--steps", "4"]
    status = run_command(run, "pipeline", [*options, "--out", str(tmp_path)])
    assert status in (0, 1)  # how fast it is depends on the machine
    text = (tmp_path / "pipeline.md").read_text()
    assert "14 runs as worked out" in text and "pp 1 x cp 2" in text and "A barrier per tick" in text
    assert len((tmp_path / "pipeline.csv").read_text().splitlines()) == 1 + 14


def test_bad_input_is_one_line(tmp_path, capsys):
    for arguments in (["--model", "magi-6b"], ["--steps", "18"], ["--ranks", "0"]):
        assert run_command(run, "pipeline", [*arguments, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("pipeline: error: ") and error.count("\n") == 1

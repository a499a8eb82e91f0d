"""Gangs of a cluster: tables and verdicts on made-up times, options, and how videos are described to a cluster."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cluster import BenchSource, GangSetup, Outcome, Part, run
from benchmarks.common import run_command, table
from benchmarks.runs import alone, on_ranks
from benchmarks.workload import Made, ModelSpec, Workload, differing, digest
from engine.reuse.policy import ReuseSettings
from parallel.cluster.messages import ChunkMade, VideoDone, VideoFailed
from parallel.mesh import Layout, Mesh
from parallel.trace import RankCounters
from tests.parallel.forked import ray_workers

SPEC = ModelSpec(layers=2, width=192, side=32)
WORKLOAD = Workload(model=SPEC, chunks=2, steps=8, videos=2)


def made(*seconds, item=0.15):
    ranks = (RankCounters(rank=0, stage=0, cp_rank=0, layers=(0, 2), items=1, busy=item),)
    return [Made(seconds=one, latents=(), start=9.0, ranks=ranks) for one in seconds]


def throughput(one=(10.0, 12.0, 11.0), two=(11.0, 9.0, 10.0), problems=()):
    return Part(
        name="throughput",
        workload=replace(WORKLOAD, videos=12),
        runs={"one": made(*one), "two": made(*two)},
        problems=problems,
    )


def overhead(ranks=(10.0, 10.0, 20.0), ray=(10.2, 9.0, 11.0), problems=(), item=0.15):
    runs = {"ranks": made(*ranks, item=item), "Ray": made(*ray)}
    return Part(name="overhead", workload=WORKLOAD, runs=runs, problems=problems)


def passed(*parts):
    return [one.passed for part in parts for one in part.verdicts]


def test_figures_are_of_medians():
    assert throughput().ratio == pytest.approx(1.1)
    assert overhead().verdicts[0].measured == "+2.0%"
    assert overhead().verdicts[1].measured == "150 ms"


def test_verdicts_hold_each_figure_for_itself():
    assert passed(throughput(), overhead()) == [True] * 5
    assert passed(throughput(two=(12.0,)), overhead()) == [False, True, True, True, True]
    assert passed(throughput(two=(11.1,))) == [True, True]  # within what runs differ by
    assert passed(throughput(problems=["run 1: video 0 has other latents"])) == [True, False]
    assert passed(overhead(ray=(10.4,))) == [False, True, True]
    assert passed(overhead(item=0.09)) == [True, False, True]
    assert passed(overhead(problems=["run 2: gang-0: it has died"])) == [True, True, False]


def test_tables_have_every_way_and_every_repeat():
    text = table([*throughput().rows, *overhead().rows])
    assert text.count("\n") == 5 and "10.00 12.00 11.00" in text
    first = throughput().rows[0]
    assert (first["seconds"], first["videos_per_minute"], first["start_s"]) == (11, 65.45, 9)


def test_latents_are_compared_chunk_by_chunk():
    wanted = Made(seconds=1.0, latents=(("a", "b"), ("c",)))
    assert differing([wanted, wanted], wanted) == []
    bad = [Made(seconds=1.0, latents=(("a",), ("c",))), Made(seconds=1.0, latents=(("a", "b"), ("x",)))]
    assert differing(bad, wanted) == ["run 1: video 0 has other latents", "run 2: video 1 has other latents"]
    lost = Made(seconds=1.0, latents=wanted.latents, losses=("gang-0: gone",))
    assert differing([lost], wanted) == ["run 1: gang-0: gone"]


def test_an_order_takes_a_part_of_what_a_gang_has():
    setup = GangSetup(workload=WORKLOAD, layout=Layout(pp=2), gangs=2, concurrency=3)
    orders = [setup.order(f"v{place}", one) for place, one in enumerate(WORKLOAD.requests)]
    size = setup.settings.size
    assert size.kv_bytes == 3 * orders[0].size.kv_bytes and size.slots == 3 * 4
    assert orders[0].size.chunks == 2 and orders[0].request.seed != orders[1].request.seed
    assert setup.settings.gangs == 2


def test_a_source_builds_the_stage_of_a_rank():
    source, layout = BenchSource(spec=SPEC), Layout(pp=2)
    first, second = (source.stage(Mesh(layout=layout, rank=rank), "cpu").model.kv.layers for rank in (0, 1))
    assert (first, second) == (range(1), range(1, 2))
    assert source.lead(Mesh(layout=layout, rank=0), "cpu").model.kv.layers == range(1)
    assert source.identity == BenchSource(spec=SPEC).identity != BenchSource(spec=ModelSpec()).identity


def chunk(index, value=0.0):
    latents = np.full((1, 2, 1, 2, 2), value, dtype=np.float32)
    return ChunkMade(video="v", index=index, frames=np.zeros((0, 1, 1, 3), dtype=np.uint8), latents=latents)


def test_an_outcome_notes_chunks_that_come_out_of_order():
    outcome = Outcome(chunks={"v": [], "w": []})
    for event in (chunk(0), chunk(1, 1.0), chunk(1, 1.0)):
        outcome.on_event(event)
    assert outcome.problems == ["v: chunk 1 came where 2 was due"] and outcome.waiting == 2
    assert outcome.chunks["v"][0] != outcome.chunks["v"][1] == digest(chunk(0, 1.0).latents)
    outcome.on_event(VideoDone(video="v", computed=1.0, kv_bytes=1))
    outcome.on_event(VideoFailed(video="w", message="no"))
    assert outcome.waiting == 0 and outcome.failed == {"w": "no"}


def test_bad_input_is_one_line(tmp_path, capsys):
    cases = (
        (["--parts", "speed"], "there is no part 'speed'"),
        (["--repeats", "0"], "repeats"),
    )
    for arguments, said in cases:
        assert run_command(run, "cluster", [*arguments, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("cluster: error: ") and error.count("\n") == 1 and said in error


@pytest.mark.slow
def test_ranks_make_the_videos_of_one_process():
    reuse = ReuseSettings(clean_pass=False, copy_pass=False)
    workload = Workload(model=SPEC, chunks=2, steps=8, videos=2, reuse=reuse)
    (made,), (wanted,) = on_ranks(Layout(pp=2), [workload], torchrun=True), alone([workload])
    assert differing([made], wanted) == [] and made.seconds > 0 and 0 < made.item < made.seconds


@pytest.mark.slow
def test_the_command_writes_everything(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    for name, value in ray_workers().items():
        monkeypatch.setenv(name, value)
    status = run_command(run, "cluster", ["--quick", "--parts", "throughput", "--out", str(tmp_path)])
    text = (tmp_path / "cluster.md").read_text()
    assert status in (0, 1) and "0 differ" in text  # how fast it is depends on the machine
    assert len((tmp_path / "cluster.csv").read_text().splitlines()) == 1 + 2

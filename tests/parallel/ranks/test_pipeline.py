"""Videos over several ranks: the same bits as from one process, and no work for what is reused."""

from collections import Counter

import numpy as np
import pytest
import torch

from engine.kv.layout import KVSettings
from engine.record import NOT_ACTIVE
from engine.request import encode, prepare
from engine.reuse.flags import FlagLog
from engine.reuse.policy import ReuseSettings
from parallel.comm.messages import HEADER_BYTES
from tests.engine.reference import reference_latents
from tests.parallel.on_ranks import command, run, torchrun
from tests.parallel.scenarios.videos import settings, wanted
from tests.parallel.small import SmallPipeline, one_thread, small_config

pytestmark = pytest.mark.slow

FLOWCACHE = {"policy": "flowcache", "threshold": 0.1, "warmup_steps": 2, "clean_pass": False}
TOKENS, HIDDEN, FLOATS = 36, 32, 4
VELOCITY = 16 * 6 * 4 * 6 * FLOATS


def alone(values):
    """The same videos from one process, with all keys and values on the device: latents and records."""
    one_thread()
    pipeline = SmallPipeline(small_config(**values.get("config", {})))
    reuse, kv = settings({**values, "offload": False})
    made, records = [], []
    for one in wanted(values):
        latents, items, decisions = reference_latents(pipeline, one, reuse, kv)
        made.append(latents)
        records.append(Record(one, pipeline, items, decisions))
    return made, records


class Record:
    """What the plain loop did of one video, in the form of a record."""

    def __init__(self, one, pipeline, items, decisions):
        made, _ = prepare(
            pipeline, one, encode(pipeline, one), number=0, reuse=ReuseSettings(), kv=KVSettings(), observe=False
        )
        schedule = made.schedule
        counts = Counter(item.tick for item in items)
        self.tick_items = np.array([counts[tick] for tick in range(schedule.ticks)])
        self.flags = np.full((schedule.ticks, schedule.chunks), NOT_ACTIVE, dtype=np.uint8)
        for place, decision in decisions.items():
            self.flags[place] = decision.value
        self.computed_fraction = float((self.flags[self.flags != NOT_ACTIVE] == 0).mean())


def close(made, expected, tolerance=1e-5):
    """With context parallelism sums are taken in another order, and not on every CPU to the same bits."""
    assert [len(video) for video in made] == [len(video) for video in expected]
    for video, other in zip(made, expected, strict=True):
        for a, b in zip(video, other, strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


def same(made, expected):
    assert [len(video) for video in made] == [len(video) for video in expected]
    for video, other in zip(made, expected, strict=True):
        for a, b in zip(video, other, strict=True):
            assert torch.equal(a, b)


CASES = {
    "two stages": {"pp": 2},
    "three uneven stages, guided": {"pp": 3, "config": {"guided": True, "window": 2}, "split": [1, 3, 1]},
    "compressed": {
        "pp": 2,
        "budget": 1,
        "offload": True,
        "config": {"ranges": ()},
        "trace": True,
        "requests": [{"chunks": 6}],
    },
    "image": {"pp": 2, "requests": [{"prefix": 1}]},
    "clip, guided, renewed and reused": {
        "pp": 2,
        "offload": True,
        "config": {"guided": True},
        "requests": [{"prefix": 32}],
        "cache": {**FLOWCACHE, "threshold": 0.3, "clean_pass": True},
        "trace": True,
    },
    "teacache": {"pp": 2, "cache": {"policy": "teacache", "threshold": 0.1, "warmup_steps": 3}, "trace": True},
    "barrier": {"pp": 2, "barrier": True},
}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_stages_make_the_same_bits_as_one_process(tmp_path, values):
    values = dict(values)
    pp = values.pop("pp")
    got = run(tmp_path, pp=pp, **values)
    expected, records = alone(values)
    same(got["latents"], expected)
    for video, record in enumerate(records):
        if values.get("trace"):
            assert torch.equal(got["flags"][video], torch.from_numpy(record.flags))
            assert got["items"][video].tolist() == record.tick_items.tolist()
    sizes = [report.layers[1] - report.layers[0] for report in got["reports"]]
    assert sum(sizes) == 5
    assert sizes == values.get("split", sizes)


def test_host_memory_changes_no_bit_where_ranks_share_the_heads(tmp_path):
    values = {"cp": 2, "budget": 1, "config": {"guided": True, "window": 1}, "requests": [{"chunks": 4}]}
    same(*(run(tmp_path, offload=offload, **values)["latents"] for offload in (True, False)))


def test_a_reused_chunk_costs_no_stage_anything(tmp_path):
    """Calls and bytes of every rank are those of the computed items; all ranks have seen the same flags."""
    values = {"cache": FLOWCACHE, "trace": True, "requests": [{"chunks": 7}, {"chunks": 5, "seed": 9}]}
    got = run(tmp_path, pp=3, concurrency=2, **values)
    expected, records = alone(values)
    same(got["latents"], expected)
    items = sum(int(record.tick_items.sum()) for record in records)
    assert 0.1 < records[0].computed_fraction < 0.9
    for report in got["reports"]:
        assert report.items == items
        hidden = 0 if report.rank == 0 else items * (HEADER_BYTES + TOKENS * HIDDEN * FLOATS)
        assert report.item_bytes == hidden
    assert got["reports"][0].velocity_bytes == items * (HEADER_BYTES + VELOCITY)
    pipeline = SmallPipeline(small_config())
    for video, record in enumerate(records):
        one = wanted(values)[video]
        cache, kv = settings(values)
        made, _ = prepare(pipeline, one, encode(pipeline, one), number=0, reuse=cache, kv=kv, observe=False)
        log = FlagLog(made.schedule)
        log.add(int(record.flags[tick.index, chunk]) for tick in made.schedule for chunk, _ in tick.active)
        assert {report.digests[str(video)] for report in got["reports"]} == {log.digest.hex()}


def test_several_videos_at_once_are_those_made_one_by_one(tmp_path):
    """Different lengths, sizes and step counts in flight together; more requests than places."""
    requests = [
        {"chunks": 5},
        {"chunks": 2, "seed": 1, "height": 64},
        {"chunks": 3, "seed": 2, "prompt": "another thing", "num_steps": 4},
        {"chunks": 1, "seed": 5},
        {"chunks": 4, "seed": 6, "prefix": 1},
    ]
    values = {"requests": requests, "cache": {**FLOWCACHE, "clean_pass": True}}
    got = run(tmp_path, pp=2, concurrency=3, **values)
    same(got["latents"], alone(values)[0])


def test_settings_reach_every_stage(tmp_path):
    """The budget holds on the stages, and the leader's record says so."""
    values = {"budget": 2, "cache": FLOWCACHE, "trace": True, "requests": [{"chunks": 6}]}
    got = run(tmp_path, pp=2, split=[4, 1], **values)
    expected, _ = alone(values)
    same(got["latents"], expected)
    kept = got["kept"][0]
    assert kept[4].sum().item() == pytest.approx(2)
    assert kept[0].tolist() == [1, 0, 0, 0, 0, 0]


def speed_up(got, values):
    """Over one process, which would run the same items one after another."""
    return got["reports"][0].items * values["config"]["layers"] * values["layer_seconds"] / got["seconds"]


@pytest.mark.alone
def test_stages_work_at_the_same_time_and_a_barrier_per_tick_costs_time(tmp_path):
    """With layers that take 30 ms each, so that the cores of this machine do not matter; 2.75 is the most there is."""
    values = {"config": {"layers": 4}, "requests": [{"chunks": 6}], "layer_seconds": 0.03}
    free = run(tmp_path, "slow", pp=4, **values)
    held = run(tmp_path, "slow", pp=4, barrier=True, **values)
    same(held["latents"], free["latents"])
    assert speed_up(free, values) > 2.2
    assert held["seconds"] / free["seconds"] > 1.12


@pytest.mark.alone
def test_two_videos_fill_the_stages_that_reuse_leaves_idle(tmp_path):
    requests = [{"chunks": 6}, {"chunks": 6, "seed": 1}]
    values = {"config": {"layers": 4}, "cache": FLOWCACHE, "layer_seconds": 0.03}
    one = run(tmp_path, "slow", pp=2, requests=requests[:1], **values)
    two = run(tmp_path, "slow", pp=2, requests=requests, concurrency=2, **values)
    assert speed_up(two, values) > 1.7
    assert speed_up(two, values) > 1.1 * speed_up(one, values)


def test_a_gang_goes_on_after_a_video_that_was_given_up_or_refused(tmp_path):
    got = run(tmp_path, "abandoned", pp=2)
    same(got["latents"], alone({"requests": [{"seed": 1}, {"seed": 2}]})[0])
    assert "multiple of 4" in got["refused"]
    for reports in got["reports"]:
        assert reports[0].digests == reports[1].digests
        assert reports[0].items == reports[1].items


def test_torchrun_starts_the_same_ranks(tmp_path):
    values = {"layout": {"pp": 2}, "requests": [{"chunks": 2}]}
    done = torchrun(command("videos", tmp_path / "out.pt", values))
    assert done.returncode == 0, done.stderr
    same(torch.load(tmp_path / "out.pt", weights_only=False)["latents"], alone(values)[0])

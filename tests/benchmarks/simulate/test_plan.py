"""Plans against the engine's own order of work, and flags that are made up."""

import numpy as np
import pytest

from benchmarks.simulate.clock import Machine, plan_video, simulate
from benchmarks.simulate.layouts import modelled_flags, recorded_flags
from engine.engine import Engine
from engine.executor import LocalRunner
from engine.record import NOT_ACTIVE, Recorder
from engine.reuse.policy import ReuseSettings
from engine.schedule import Schedule
from models.errors import InputError
from models.magi.sampling import MagiSampling
from tests.parallel.small import SmallPipeline, request, small_config

FLOWCACHE = ReuseSettings(policy="flowcache", threshold=0.1, warmup_steps=2, clean_pass=False)
CASES = {
    "plain": {},
    "guided": {"config": {"guided": True}},
    "window 1": {"config": {"window": 1}},
    "one step per stage": {"config": {"num_steps": 4}, "request": {"num_steps": 4}},
    "flowcache": {"reuse": FLOWCACHE},
    "teacache": {"reuse": ReuseSettings(policy="teacache", threshold=0.1, warmup_steps=3)},
}


class Recording(LocalRunner):
    def __init__(self, pipeline):
        super().__init__(pipeline.model, pipeline.attention)
        self.items = []

    def begin(self, work):
        self.items.append(work.item)
        super().begin(work)


def sampling_of(pipeline, wanted, reuse):
    return pipeline.sampling(wanted.num_steps, clean_pass=reuse.clean_pass, copy_pass=reuse.copy_pass)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_plan_has_the_passes_of_the_engine_in_its_order(case, one_thread):
    pipeline, reuse = SmallPipeline(small_config(2, **case.get("config", {}))), case.get("reuse", ReuseSettings())
    wanted = request(chunks=6, **case.get("request", {}))
    runner, recorder = Recording(pipeline), Recorder()
    for _ in Engine(pipeline, runner, reuse=reuse).generate(wanted, recorder=recorder):
        pass
    record = recorder.finish({})
    plan = plan_video(
        record.schedule.spans[0],
        sampling_of(pipeline, wanted, reuse),
        lambda what, step: (1.0, 1.0),
        record.flags,
        whole_window=reuse.policy == "teacache",
    )
    spans = simulate([plan], Machine(stages=2)).spans
    planned = [(span.tick, span.chunk, span.name) for span in spans if span.stage == 0]
    made = [(item.tick, item.chunk, item.what.name) for item in runner.items]
    assert planned == made
    assert plan.calls == len(made)
    assert plan.returning == sum(bool(item.what.weight) for item in runner.items)
    if reuse.policy != "none":
        assert 0 < record.computed_fraction < 1


def distilled(steps=16):
    return MagiSampling(config=small_config(2), num_steps=steps)


@pytest.mark.parametrize("fraction", [0.4, 0.55, 0.8])
def test_made_up_flags_compute_the_share_that_was_asked_for(fraction):
    schedule = Schedule(first=0, chunks=12, num_steps=16, window=4)
    flags = modelled_flags(schedule, distilled(), fraction=fraction, warmup=3)
    steps = np.array([[flags[schedule.tick_of(c, s), c] for s in range(16)] for c in range(12)])
    assert (steps == 0).mean() == pytest.approx(fraction, abs=0.03)
    assert (steps[:, :3] == 0).all()
    assert (flags != NOT_ACTIVE).sum() == steps.size
    assert (steps[:, 12:] == 0).mean() > (steps[:, 4:8] == 0).mean()  # the cleanest chunk reuses least
    again = modelled_flags(schedule, distilled(), fraction=fraction, warmup=3)
    other = modelled_flags(schedule, distilled(), fraction=fraction, warmup=3, seed=1)
    assert (again == flags).all() and (other != flags).any()


def test_a_share_below_the_warm_up_cannot_be_had():
    with pytest.raises(InputError, match="8 warm-up steps"):
        modelled_flags(Schedule(first=0, chunks=4, num_steps=16, window=4), distilled(), fraction=0.3, warmup=8)


def test_a_record_is_stretched_over_more_chunks():
    short = Schedule(first=1, chunks=3, num_steps=4, window=2)
    long = Schedule(first=0, chunks=5, num_steps=4, window=2)
    decisions = np.array([[0, 1, 0, 2], [0, 0, 1, 1]], dtype=np.uint8)
    made = recorded_flags(decisions, long, short)
    for chunk in range(5):
        own = [int(made[long.tick_of(chunk, step), chunk]) for step in range(4)]
        assert own == list(decisions[chunk % 2])
    with pytest.raises(InputError, match="give --steps 4"):
        recorded_flags(decisions, Schedule(first=0, chunks=5, num_steps=8, window=2), short)


def test_flags_of_another_video_are_refused():
    with pytest.raises(InputError, match="do not fit"):
        plan_video(
            Schedule(first=0, chunks=4, num_steps=16, window=4),
            distilled(),
            lambda what, step: (1.0,),
            np.zeros((3, 4), dtype=np.uint8),
        )

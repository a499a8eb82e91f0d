"""The scheduler under anything that may happen: gangs die and come back, requests are cancelled and keep coming."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from models.errors import InputError
from parallel.cluster.scheduler import GangSize, RequestState, Scheduler
from tests.parallel.cluster.simulation import WINDOW, World, size

ENDS = {RequestState.DONE, RequestState.QUARANTINED, RequestState.CANCELLED}
SIZES = st.builds(
    GangSize, slots=st.integers(1, 3).map(lambda runs: runs * WINDOW), kv_bytes=st.sampled_from([10, 25, 40])
)


class Cluster(RuleBasedStateMachine):
    @initialize(size=SIZES, gangs=st.integers(1, 3), share=st.integers(1, 4))
    def start(self, size, gangs, share):
        self.world = World(size, gangs, share=share)
        self.events = []
        self.twin = Scheduler(size, share=share)
        self._record(self.world.scheduler)

    def _record(self, scheduler):
        """Note every event, for a twin that must plan the same."""
        for name in (
            *("submit", "cancel", "quantum_ready", "quantum_done", "request_done"),
            *("gang_up", "gang_down", "decide"),
        ):
            original = getattr(scheduler, name)

            def noted(*arguments, name=name, original=original, **named):
                self.events.append((name, arguments, named))
                return original(*arguments, **named)

            setattr(scheduler, name, noted)

    def _down(self):
        return [name for name, gang in self.world.gangs.items() if not gang.up]

    def _up(self):
        return [name for name, gang in self.world.gangs.items() if gang.up]

    @rule(chunks=st.integers(1, 5), kv=st.integers(0, 45), priority=st.integers(-1, 2))
    def submit(self, chunks, kv, priority):
        name, video = f"video {len(self.events)}", size(chunks=chunks, kv_bytes=kv)
        if self.world.size.holds(video):
            self.world.submit(name, chunks=chunks, kv_bytes=kv, priority=priority)
        else:
            with pytest.raises(InputError, match="values, a gang has"):
                self.world.submit(name, chunks=chunks, kv_bytes=kv, priority=priority)

    @precondition(lambda self: self._down())
    @rule(data=st.data())
    def gang_comes(self, data):
        self.world.up(data.draw(st.sampled_from(self._down())))

    @precondition(lambda self: self._up())
    @rule(data=st.data(), reason=st.sampled_from([None, "nan", "no space"]))
    def gang_dies(self, data, reason):
        name = data.draw(st.sampled_from(self._up()))
        held = sorted(self.world.gangs[name].held)
        self.world.down(name, {data.draw(st.sampled_from(held)): reason} if reason and held else None)

    @precondition(lambda self: self.world.resident())
    @rule(data=st.data(), steps=st.integers(1, 6))
    def work(self, data, steps):
        for _ in range(steps):
            if self.world.resident():
                self.world.step(data.draw(st.sampled_from(self.world.resident())))
                self.world.decide()

    @precondition(lambda self: self.world.resident())
    @rule(data=st.data())
    def checkpoint(self, data):
        self.world.checkpoint(data.draw(st.sampled_from(self.world.resident())))

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel(self, data):
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.requests))))

    @invariant()
    def decisions_hold(self):
        if hasattr(self, "world"):
            self.world.decide()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        for name in self._down():
            self.world.up(name)
        self.world.run()
        assert set(self.world.ended.values()) <= ENDS and self.world.ended.keys() == self.world.requests.keys()
        plan = []
        for name, arguments, named in self.events:
            try:
                answer = getattr(self.twin, name)(*arguments, **named)
            except InputError:
                continue
            plan += answer if name == "decide" else []
        assert plan == self.world.plan


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

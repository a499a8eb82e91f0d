"""Flags and their digest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.reuse.flags import FlagLog, FlagMismatch
from engine.schedule import Schedule
from engine.video import WorkItem
from models.protocols import Pass, PassCondition

SCHEDULE = Schedule(first=0, chunks=5, num_steps=8, window=4)
STEPS = [(tick.index, chunk, step) for tick in SCHEDULE for chunk, step in tick.active]
flags = st.lists(st.integers(0, 2), min_size=1, max_size=len(STEPS))


def item(index):
    tick, chunk, step = STEPS[index]
    condition = PassCondition(times=(0.0,))
    what = Pass(name="denoise", caption="text", branch=0, isolated=False, weight=1.0, condition=condition)
    return WorkItem(request=0, tick=tick, chunk=chunk, step=step, chunks_left=0, what=what, keys_from=None, before=())


@given(flags=flags, cut=st.integers(0, len(STEPS)))
def test_the_digest_does_not_depend_on_how_flags_come(flags, cut):
    whole, parts = FlagLog(SCHEDULE), FlagLog(SCHEDULE)
    whole.add(flags)
    parts.add(flags[:cut])
    parts.add(flags[cut:])
    assert whole.digest == parts.digest
    assert parts.count == len(flags)
    parts.check(item(len(flags) - 1), whole.digest)


@given(flags=flags, data=st.data())
def test_one_other_flag_is_seen(flags, data):
    flipped = list(flags)
    flipped[data.draw(st.integers(0, len(flags) - 1))] ^= 3
    head, other = FlagLog(SCHEDULE), FlagLog(SCHEDULE)
    head.add(flags)
    other.add(flipped)
    with pytest.raises(FlagMismatch, match="digest"):
        other.check(item(len(flags) - 1), head.digest)


def test_work_for_another_chunk_than_was_decided_is_seen():
    log = FlagLog(SCHEDULE)
    log.add([0, 0, 0])
    log.check(item(2), log.digest)
    with pytest.raises(FlagMismatch, match="out of order"):
        log.check(item(1), log.digest)


def test_more_flags_than_steps_are_seen():
    log = FlagLog(SCHEDULE)
    log.add([0] * len(STEPS))
    with pytest.raises(FlagMismatch, match="more flags"):
        log.add([0])


@given(flags=flags, cut=st.integers(0, len(STEPS)))
def test_a_log_goes_on_from_a_saved_state(flags, cut):
    whole, before, after = FlagLog(SCHEDULE), FlagLog(SCHEDULE), FlagLog(SCHEDULE)
    whole.add(flags)
    before.add(flags[:cut])
    after.restore(before.state())
    assert after.state() == before.state()
    after.add(flags[cut:])
    assert after.state() == whole.state()
    after.check(item(len(flags) - 1), whole.digest)


def test_a_state_of_a_longer_video_is_refused():
    log = FlagLog(SCHEDULE)
    with pytest.raises(ValueError, match="more than the schedule"):
        log.restore((bytes(8).hex(), len(STEPS) + 1))

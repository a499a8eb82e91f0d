"""Long videos of a family whose positions have an end: span after span, as one video."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoint.files import CheckpointConfig
from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.reuse.policy import ReuseSettings
from models.errors import InputError
from tests.engine.test_engine import HeldGate
from tests.models.wan.small import small_pipeline
from tests.parallel.small import one_thread, request

ROOT = Path(__file__).parent.parent.parent
GROUPS = {"chunk_width": 2, "stagger": 2, "window_frames": 8, "overlap_frames": 2}
REUSE = ReuseSettings(policy="flowcache", threshold=1.1, warmup_steps=2, distance="condition", clean_pass=False)


def engine():
    one_thread()
    return Engine(small_pipeline(**GROUPS), reuse=REUSE)


def latents(made, **changes):
    return [chunk.latents for chunk in made.generate(request(num_steps=6, **changes), decode=False)]


def test_a_long_video_begins_as_a_short_one_and_goes_on_from_its_end():
    """Four groups, then three more for each span; each goes on from the last group of the span before."""
    short, long, longer = (latents(engine(), chunks=chunks) for chunks in (4, 7, 9))
    assert [len(made) for made in (short, long, longer)] == [4, 7, 9]
    for a, b, c in zip(short, long, longer, strict=False):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(long, longer, strict=False))
    # Noise of the second span is its own: the same place in the window does not give the same latents.
    assert not torch.equal(long[4], long[1])


def test_it_is_counted_as_one_video_whatever_is_made_beside_it():
    made, told = engine(), []
    long, other = request(num_steps=6, chunks=8), request(num_steps=6, chunks=3, seed=9)
    numbers = [made.submit(long, on_progress=told.append), made.submit(other)]
    found = {number: [] for number in numbers}
    while made.in_flight:
        for result in made.step():
            found[result.video].append(result.chunk)
    assert [chunk.index for chunk in found[numbers[0]]] == list(range(8))
    assert all(chunk.frames is not None for chunk in found[numbers[0]])
    for chunk, alone in zip(found[numbers[0]], latents(engine(), chunks=8), strict=True):
        assert torch.equal(chunk.latents, alone)
    assert [one.tick for one in told] == list(range(1, told[-1].ticks + 1))
    assert told[-1].chunks_done == told[-1].chunks == 8 and told[-1].steps_done == 8 * 6
    assert len({one.kv_bytes for one in told}) <= 2  # the last span may be shorter


def test_a_later_prompt_counts_the_chunks_of_the_whole_video():
    plain, changed = latents(engine(), chunks=9), latents(engine(), chunks=9, script=((6, "another thing"),))
    same = [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
    assert same[:6] == [True] * 6 and not same[6] and not same[8]


def test_a_new_prompt_of_the_first_span_is_that_of_the_later_ones():
    made, chunks, gate = engine(), [], HeldGate(2)
    number = made.submit(request(num_steps=6, chunks=9, script=((7, "a third"),)), gate=gate, decode=False)
    while made.running(number):
        chunks += [result.chunk.latents for result in made.step()]
        if gate.asked and not gate.allowed:
            made.change_prompt(number, 2, "another thing", made.read_prompt("another thing"))
            gate.allowed = True
    whole = latents(engine(), chunks=9, script=((2, "another thing"), (7, "a third")))
    assert all(torch.equal(a, b) for a, b in zip(chunks, whole, strict=True))


def test_it_goes_on_from_a_checkpoint_of_its_first_span(tmp_path):
    wanted, kept = request(num_steps=6, chunks=7), CheckpointConfig(folder=tmp_path, every=1)
    first, chunks = engine(), []
    number = first.submit(first.read(wanted, kept), decode=False)
    while len(chunks) < 2:
        chunks += [result.chunk for result in first.step()]
    first.cancel(number)
    again = engine()
    found = again.read(wanted, kept)
    assert found.found is not None and found.first < 4
    rest = [chunk.latents for chunk in again.generate(found, decode=False)]
    whole = latents(engine(), chunks=7)
    assert len(rest) == 7 - found.first
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[found.first :], strict=True))


def test_of_a_prefix_the_last_whole_groups_count_and_a_shorter_one_is_refused():
    frames = torch.zeros(32, 32, 48, 3, dtype=torch.uint8)
    used, _ = engine()._pipeline.sampling(4, clean_pass=True, copy_pass=True).prefix(32)
    assert used < 32
    made = latents(engine(), prefix=frames), latents(engine(), prefix=frames[-used:])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    with pytest.raises(InputError, match="goes on from 5 frames and more, and 3 are given"):
        latents(engine(), prefix=frames[:3])


MEMORY = """
import resource, sys
from tests.engine.test_spans import engine, request
made = engine()
for _ in made.generate(request(num_steps=3, height=96, width=96, chunks=1 + 3 * int(sys.argv[1])), decode=False):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_twenty_spans_take_the_memory_of_four():
    def peak(spans):
        command = [sys.executable, "-c", MEMORY, str(spans)]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert peak(20) <= 1.02 * peak(4)


def test_four_steps_attend_to_a_range_that_is_held_and_no_further():
    """Self-Forcing has no end: buffers hold what is attended to, however long the video is."""
    one_thread()
    pipeline = small_pipeline(method="self-forcing", chunk_width=2, window_frames=6, overlap_frames=2)
    for budget in (None, 1):
        sizes = []
        for chunks in (5, 9):
            told = []
            made = Engine(pipeline, kv=KVSettings(budget=budget))
            found = list(made.generate(request(num_steps=4, chunks=chunks), told.append, decode=False))
            assert len(found) == chunks
            sizes.append({one.kv_bytes for one in told})
        assert sizes[0] == sizes[1] and len(sizes[0]) == 1

"""The engine as a whole, on a tiny random model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.checkpoint.files import CheckpointConfig
from engine.engine import Engine
from engine.executor import FiniteCheck, LocalRunner, NotFinite
from engine.kv.layout import KVSettings
from engine.record import Recorder
from engine.reuse.policy import ReuseSettings
from engine.video import WorkItem
from models.errors import InputError
from models.protocols import Pass, PassCondition
from tests.engine.reference import reference_latents
from tests.engine.tiny import TinyPipeline, request, tiny_config

ROOT = Path(__file__).parent.parent.parent
FLOWCACHE = ReuseSettings(policy="flowcache", threshold=0.05, warmup_steps=2, clean_pass=False)


def latents(engine, wanted):
    return [chunk.latents for chunk in engine.generate(wanted)]


def test_chunks_come_in_order_with_frames():
    chunks = list(Engine(TinyPipeline(tiny_config())).generate(request()))
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    for chunk in chunks:
        assert chunk.latents.shape == (1, 16, 6, 4, 6)
        assert chunk.frames.shape == (24, 32, 48, 3)
        assert torch.isfinite(chunk.latents).all()


def test_a_seed_gives_the_same_video_and_another_seed_another():
    engine = Engine(TinyPipeline(tiny_config()))
    first, again = latents(engine, request()), latents(engine, request())
    other = latents(engine, request(seed=4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_the_start_of_a_video_does_not_depend_on_its_length():
    engine = Engine(TinyPipeline(tiny_config()))
    short, long = latents(engine, request(chunks=3)), latents(engine, request(chunks=9))
    for a, b in zip(short, long, strict=False):
        assert torch.equal(a, b)


class HeldGate:
    """Lets no chunk in from one on until that is allowed."""

    def __init__(self, first):
        self.first, self.asked, self.allowed = first, False, False

    def announce(self, quantum):
        pass

    def open(self, quantum):
        self.asked |= quantum >= self.first
        return quantum < self.first or self.allowed


@pytest.mark.parametrize(("frames", "first"), [(0, 2), (0, 0), (1, 1), (56, 2)])
def test_a_new_prompt_in_the_middle_makes_what_a_script_would(tmp_path, frames, first):
    """Also where the script has one there already; and the checkpoints are those of the script from then on."""
    prefix = torch.zeros(frames, 32, 48, 3, dtype=torch.uint8) if frames else None
    asked = request(chunks=6, prefix=prefix, script=((first or 1, "a second thing"), (5, "a third")))
    changed = asked.with_prompt(first, "quite another thing")
    config = CheckpointConfig(folder=tmp_path, every=1)
    engine, gate, made = Engine(TinyPipeline(tiny_config())), HeldGate(first), []
    number = engine.submit(engine.reader.read(asked, config), gate=gate)
    while engine.running(number):
        made += engine.step()
        if gate.asked and not gate.allowed:
            text = "quite another thing"
            engine.change_prompt(number, first, text, engine.reader.read_prompt(text))
            gate.allowed = True
    for one, whole in zip(made, latents(engine, changed), strict=True):
        assert torch.equal(one.chunk.latents, whole)
    assert engine.reader.read(changed, config).found.quantum > first
    with pytest.raises(InputError, match="another request"):
        engine.reader.read(asked, config)


@pytest.mark.parametrize(("frames", "first", "count"), [(1, 6, 4), (32, 4, 4), (24, 6, 3)])
def test_a_prefix_gives_the_published_number_of_latents(frames, first, count):
    """An image makes one chunk more, and keeps its latent; a clip's own latents are not handed out (part 3)."""
    prefix = torch.zeros(frames, 32, 48, 3, dtype=torch.uint8)
    made = latents(Engine(TinyPipeline(tiny_config())), request(chunks=3, prefix=prefix))
    assert [part.shape[2] for part in made] == [first] + [6] * (count - 1)


def test_a_prefix_too_short_for_a_latent_is_refused():
    prefix = torch.zeros(3, 32, 48, 3, dtype=torch.uint8)
    with pytest.raises(InputError, match="3 frames is too short"):
        latents(Engine(TinyPipeline(tiny_config())), request(prefix=prefix))


def test_steps_that_do_not_fit_the_window_are_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        latents(Engine(TinyPipeline(tiny_config())), request(num_steps=10))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_rolling_buffer_gives_what_full_history_gives(guided, window, monkeypatch):
    """Rows that fall out of the buffer are never attended to, for any window and range."""
    pipeline = TinyPipeline(tiny_config(guided=guided, window=window))
    rolling = latents(Engine(pipeline), request(chunks=7))
    monkeypatch.setattr("engine.kv.layout.clean_chunks", lambda schedule, sampling, budget: schedule.chunks - 1)
    held = latents(Engine(pipeline), request(chunks=7))
    for a, b in zip(rolling, held, strict=True):
        assert torch.equal(a, b)


def test_a_budget_that_holds_everything_changes_nothing():
    pipeline = TinyPipeline(tiny_config(ranges=()))
    free = latents(Engine(pipeline), request(chunks=6))
    budget = latents(Engine(pipeline, kv=KVSettings(budget=5)), request(chunks=6))
    tight = latents(Engine(pipeline, kv=KVSettings(budget=1)), request(chunks=6))
    for a, b in zip(free, budget, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(free[-1], tight[-1])


def test_reused_steps_have_no_work(monkeypatch):
    """The passes that are run are exactly those of the computed chunk-steps and of the finished chunks."""
    counted = []
    begin = LocalRunner.begin
    monkeypatch.setattr(LocalRunner, "begin", lambda self, work: (counted.append(work.item), begin(self, work)))
    recorder = Recorder()
    list(Engine(TinyPipeline(tiny_config()), reuse=FLOWCACHE).generate(request(chunks=6), recorder=recorder))
    record = recorder.finish({})
    computed = {(int(t), int(c)) for t, c in zip(*(record.flags == 0).nonzero(), strict=True)}
    assert 0.1 < record.computed_fraction < 0.9
    assert {(item.tick, item.chunk) for item in counted} == computed
    assert (record.flags[-1][-1:] == 0).all(), "the last tick is computed"
    assert len(counted) == record.tick_items.sum()
    order = [(item.tick, item.chunk) for item in counted]
    assert order == sorted(order)


GUIDED_CLIP = {"guided": True, "prefix": 40}


@pytest.mark.parametrize(
    ("changes", "reuse", "kv"),
    [
        ({}, ReuseSettings(), KVSettings()),
        ({}, FLOWCACHE, KVSettings(budget=1)),
        ({}, replace(FLOWCACHE, clean_pass=True, extrapolate_from=0.5), KVSettings()),
        ({}, ReuseSettings(policy="teacache", threshold=0.05, warmup_steps=2), KVSettings(budget=2)),
        (GUIDED_CLIP, ReuseSettings(), KVSettings()),
        (GUIDED_CLIP, FLOWCACHE, KVSettings(budget=2)),
        ({"prefix": 1}, FLOWCACHE, KVSettings()),
    ],
    ids=["plain", "compressed", "renewed", "teacache", "guided clip", "guided clip, compressed", "image"],
)
def test_the_engine_makes_the_bits_of_a_plain_loop(changes, reuse, kv, monkeypatch):
    pipeline, wanted = TinyPipeline(tiny_config(guided=changes.get("guided", False))), request()
    if frames := changes.get("prefix"):
        picture = torch.randint(0, 255, (frames, 32, 48, 3), dtype=torch.uint8)
        wanted = request(prefix=picture)
    expected, items, _ = reference_latents(pipeline, wanted, reuse, kv)
    ran = []
    begin = LocalRunner.begin
    monkeypatch.setattr(LocalRunner, "begin", lambda self, work: (ran.append(work.item), begin(self, work)))
    made = latents(Engine(pipeline, reuse=reuse, kv=kv), wanted)
    assert ran == items
    assert len(made) == len(expected)
    for a, b in zip(made, expected, strict=True):
        assert torch.equal(a, b)


def test_videos_made_together_are_those_made_alone():
    pipeline = TinyPipeline(tiny_config())
    wanted = [request(seed=1), request(seed=2, chunks=2), request(seed=3)]
    engine = Engine(pipeline, reuse=FLOWCACHE)
    numbers = [engine.submit(one) for one in wanted]
    made = {number: [] for number in numbers}
    while engine.in_flight:
        for result in engine.step():
            made[result.video].append(result.chunk.latents)
    for one, number in zip(wanted, numbers, strict=True):
        expected, *_ = reference_latents(pipeline, one, FLOWCACHE)
        assert all(torch.equal(a, b) for a, b in zip(made[number], expected, strict=True))


def test_a_cancelled_video_leaves_the_others_alone():
    pipeline = TinyPipeline(tiny_config())
    engine = Engine(pipeline)
    stays, goes = engine.submit(request(seed=1)), engine.submit(request(seed=2))
    made = [result for _ in range(5) for result in engine.step()]
    engine.cancel(goes)
    assert not engine.running(goes)
    while engine.in_flight:
        made += engine.step()
    expected, *_ = reference_latents(pipeline, request(seed=1))
    own = [result.chunk.latents for result in made if result.video == stays]
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def spoilt(engine, wanted, **changes):
    """A request whose second chunk starts from noise that has one NaN in it."""
    read = engine.reader.read(wanted, **changes)

    def noise(chunk, shape, draw):
        part = read.encoded.noise(0)(chunk, shape, draw)
        part[..., 0, 0] += float("nan") if chunk == 1 else 0
        return part

    return replace(read, encoded=replace(read.encoded, noise=lambda span: noise))


def finish(engine, made):
    while engine.in_flight:
        for result in engine.step():
            made.setdefault(result.video, []).append(result.chunk.latents)
    return made


def test_a_video_that_comes_to_nan_is_named_and_the_others_go_on(tmp_path):
    """At the first item that is not finite, and without the checkpoints that may be wrong already."""
    engine, made = Engine(TinyPipeline(tiny_config())), {}
    good = engine.submit(request(seed=1))
    bad = engine.submit(spoilt(engine, request(seed=2), checkpoint=CheckpointConfig(folder=tmp_path, every=1)))
    with pytest.raises(NotFinite, match=r"^rank 0 has computed NaN or infinity at tick 2, chunk 1: ") as caught:
        finish(engine, made)
    assert caught.value.video == bad and not list(tmp_path.glob("quantum-*/manifest.json"))
    engine.cancel(bad)
    finish(engine, made)
    expected, *_ = reference_latents(TinyPipeline(tiny_config()), request(seed=1))
    assert list(made) == [good]
    assert all(torch.equal(a, b) for a, b in zip(made[good], expected, strict=True))


def test_a_chunk_that_is_not_finite_is_not_handed_out(monkeypatch):
    """Where the runner says nothing, as that of a GPU may say it too late: in its last tick, and before it is used."""
    monkeypatch.setattr(LocalRunner, "not_finite", lambda self, video: None)
    engine, made = Engine(TinyPipeline(tiny_config())), {}
    bad, good = engine.submit(spoilt(engine, request(seed=2))), engine.submit(request(seed=1))
    with pytest.raises(NotFinite, match=r"at tick 9, chunk 1: "):
        finish(engine, made)
    assert len(made[bad]) == 1
    engine.cancel(bad)
    assert len(finish(engine, made)[good]) == 4


def test_answers_of_a_device_are_read_once_it_has_passed_them():
    events = []

    class Event:
        def __init__(self):
            self.passed = False
            events.append(self)

        def record(self):
            pass

        def query(self):
            return self.passed

    check = FiniteCheck(Event)
    condition = PassCondition(times=(0.0,))
    what = Pass(name="denoise", caption="text", branch=0, isolated=False, weight=1.0, condition=condition)
    same = {"chunk": 0, "step": 0, "chunks_left": 0, "what": what, "keys_from": None, "before": ()}
    items = [WorkItem(request=video, tick=tick, **same) for tick in range(3) for video in (4, 5)]
    for item in items:
        bad = item.request == 5 and item.tick > 0
        check.look(item, torch.tensor([1e30, float("inf") if bad else -1e30]))
    assert check.found(5) is None
    for event in events[:3]:
        event.passed = True
    assert check.found(5) is None
    for event in events[3:]:
        event.passed = True
    assert check.found(5) == items[3] and check.found(4) is None
    check.forget(5)
    assert check.found(5) is None


def test_every_kind_of_reuse_makes_a_video():
    pipeline = TinyPipeline(tiny_config())
    plain = latents(Engine(pipeline), request())
    for kind in ("residual", "velocity", "extrapolate"):
        cache = ReuseSettings(policy="flowcache", threshold=0.2, warmup_steps=2, reuse=kind)
        made = latents(Engine(pipeline, reuse=cache), request())
        assert all(torch.isfinite(part).all() for part in made)
        assert not torch.equal(made[-1], plain[-1])


MEMORY = """
import resource, sys
import torch
torch.set_num_threads(1)
from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.request import Request
from tests.engine.tiny import TinyPipeline, tiny_config

budget = int(sys.argv[1]) or None
pipeline = TinyPipeline(tiny_config(num_steps=4))
engine = Engine(pipeline, kv=KVSettings(budget=budget))
for chunk in engine.generate(Request(prompt="x", chunks=40, height=128, width=128, num_steps=4, seed=0)):
    if chunk.index + 1 in (10, 40):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 2])
def test_memory_does_not_grow_with_length(budget):
    command = [sys.executable, "-c", MEMORY, str(budget)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after_10, after_40 = map(int, done.stdout.split())
    assert after_40 <= 1.02 * after_10


@pytest.mark.parametrize("frames", [0, 1, 36])
def test_a_later_prompt_changes_the_chunks_from_its_own_on_and_none_before(frames):
    prefix = torch.zeros(frames, 32, 48, 3, dtype=torch.uint8) if frames else None
    engine, asked = Engine(TinyPipeline(tiny_config())), request(prefix=prefix)
    plain = latents(engine, asked)
    changed = latents(engine, replace(asked, script=((2, "another thing"),)))  # of those that are made, prefix aside
    equal = [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
    assert equal == [True, True] + [False] * (len(plain) - 2)


@pytest.mark.parametrize("script", [((0, "a"),), ((2, "a"), (2, "b")), ((3, "a"), (2, "b")), ((2, " "),)])
def test_a_script_out_of_order_is_refused(script):
    with pytest.raises(InputError, match="prompts of later chunks"):
        request(script=script)


class _Sums:
    """Frames as bright as all chunks so far together."""

    def __init__(self):
        self.sum = torch.zeros(())

    def __call__(self, latents):
        self.sum = self.sum + latents.sum()
        return (self.sum.abs() * 1000 % 256).to(torch.uint8).expand(24, 32, 48, 3)

    def state(self):
        return {"sum": self.sum}

    def restore(self, state):
        self.sum = state["sum"]


class _Telling(TinyPipeline):
    """Tells its chunks how many are left, up to three, and has an autoencoder that remembers."""

    def stream(self):
        return _Sums()

    def captions(self, prompt):
        table = super().captions(prompt)
        rows = torch.randn(4, 1, table.text.shape[1], generator=torch.Generator().manual_seed(1))
        return replace(table, counters=rows)


@pytest.mark.parametrize("settings", [{}, {"reuse": FLOWCACHE}, {"kv": KVSettings(budget=2)}])
@pytest.mark.parametrize(("kind", "guided", "last"), [(TinyPipeline, True, 7), (_Telling, False, 4)])
def test_a_longer_video_goes_on_from_before_the_end_of_a_shorter_one(tmp_path, kind, guided, last, settings):
    """And only there: nothing is kept that depends on where the shorter one has ended."""
    engine = Engine(kind(tiny_config(guided=guided)), **settings)
    config = CheckpointConfig(folder=tmp_path, every=3, extend=True)
    longer = request(chunks=9, script=((7, "another prompt"),))
    whole = list(engine.generate(longer))
    made = list(engine.generate(engine.reader.read(request(chunks=7), config)))
    found = engine.reader.read(longer, config)
    assert found.found is not None and found.found.quantum == last and len(made) == 7
    rest = list(engine.generate(found))
    assert [chunk.index for chunk in rest] == list(range(last - 3, 9))
    for a, b in zip(whole, (*made[: last - 3], *rest), strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.frames, b.frames)
    with pytest.raises(InputError, match="another request"):
        engine.reader.read(request(chunks=9, prompt="something else"), config)

"""What a tick makes the host wait for: one read, of the distances that reuse decides by."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.executor import FiniteCheck, Stage
from engine.kv.layout import KVSettings
from engine.request import Request, encode, prepare
from engine.reuse.policy import Decision, ReuseSettings
from tests.engine.tiny import TinyPipeline, tiny_config

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "masked_select", "unique", "__array__"}
READS |= {"__bool__", "__float__", "__int__", "__index__", "__iter__"}
COPIES = {"to", "cuda", "tensor", "as_tensor", "from_numpy"}
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave.Tensor")


class Methods(TorchFunctionMode):
    """Counts what would read a tensor of a device, or copy one to it, by its name in Python."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, function, types, arguments=(), named=None):
        name, named = getattr(function, "__name__", ""), named or {}
        moves = isinstance(named.get("device"), (str, torch.device)) or any(
            isinstance(one, (str, torch.device)) for one in arguments[1:]
        )
        if name in READS or (name in COPIES and (moves or name != "to")):
            self.seen[name] += 1
        return function(*arguments, **named)


class Operators(TorchDispatchMode):
    """Counts the same by the operators below, whoever calls them."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = str(function).removeprefix("aten.")
        if name.startswith(WAITING) or (name.startswith("_to_copy") and "device" in (named or {})):
            self.seen[name] += 1
        return function(*arguments, **(named or {}))


class Event:
    """Of a device that has passed nothing yet."""

    def record(self):
        pass

    def query(self):
        return False


class Tick:
    """The ticks of a small video, as the engine runs them."""

    def __init__(self, device="cpu", **given):
        pipeline = TinyPipeline(tiny_config(**given))
        pipeline.model.to(device)
        request = Request(prompt="a red circle moving right", chunks=7, height=32, width=32, num_steps=16, seed=0)
        self.run, admission = prepare(
            pipeline,
            request,
            encode(pipeline, request),
            number=0,
            reuse=ReuseSettings(policy="flowcache", threshold=1e-9),
            kv=KVSettings(budget=2),
            observe=False,
        )
        self.stage = Stage(pipeline.model, pipeline.attention)
        self.stage.finite = FiniteCheck(Event if device == "cpu" else torch.cuda.Event)
        self.stage.admit(admission)

    def carry_out(self, work):
        self.stage.change(work.item)
        return self.stage.velocity(work.item, self.stage.forward(work.item, self.stage.embed(work.x)))

    def items(self, tick, decided):
        for seen, decision in decided:
            if decision is Decision.COMPUTE:
                works = self.run.open(tick, seen.chunk, seen.step)
                self.run.close(
                    seen.chunk, seen.step, [one.item.what for one in works], list(map(self.carry_out, works))
                )
        self.run.seal(tick)
        for chunk in tick.finishing:
            self.run.finish(chunk)

    def before(self, number):
        """Run the ticks before one; gives that one."""
        for tick in self.run.schedule:
            if tick.index == number:
                return tick
            for work in self.run.begin(tick):
                self.carry_out(work)
            self.items(tick, self.run.decide(tick))
        raise AssertionError


MIDDLE = 25  # step 1 of 4 in its quantum: the window is full, nothing enters it or leaves it


def test_what_waits_for_a_device_is_seen():
    with Methods() as methods, Operators() as operators:
        x = torch.ones(3)
        float(x.sum()), x.tolist(), x.to("cpu"), bool(x[0] > 0), x.nonzero(), x.cpu(), x.double()
    assert sum(methods.seen.values()) == 6
    assert operators.seen["_local_scalar_dense.default"] >= 2 and operators.seen["nonzero.default"] == 1


@pytest.mark.parametrize("guided", [False, True])
def test_a_tick_reads_its_distances_and_nothing_else(guided):
    tick = Tick(guided=guided)
    now = tick.before(MIDDLE)
    with Methods() as methods, Operators() as operators:
        works = tick.run.begin(now)
        assert not works and not now.entering and not now.finishing
        decided = list(tick.run.decide(now))
        assert len(decided) == 4
        assert methods.seen == {"tolist": 1}
        tick.items(now, decided)
    assert methods.seen == {"tolist": 1} and not operators.seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_tick_on_a_gpu_waits_for_its_distances_and_nothing_else():
    tick = Tick("cuda")
    now = tick.before(MIDDLE)
    tick.run.begin(now)
    decided = list(tick.run.decide(now))
    torch.cuda.set_sync_debug_mode("error")
    try:
        tick.items(now, decided)
    finally:
        torch.cuda.set_sync_debug_mode("default")

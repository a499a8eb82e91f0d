"""The leader's command loop, with a real engine on a gang of one rank."""

import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from engine.kv.layout import KVSettings
from engine.reuse.policy import ReuseSettings
from launch.serve.live import Live
from models.magi.family import MagiLoader
from models.magi.text import T5Encoder, T5Loading
from parallel.cluster.actor import CommandLoop
from parallel.cluster.config import Source, video_size
from parallel.cluster.messages import (
    Admitted,
    CancelVideo,
    ChangePrompt,
    ChunkMade,
    ChunkTaken,
    Finish,
    GangReady,
    PermitQuantum,
    Progressed,
    QuantumDone,
    QuantumReady,
    Ticked,
    VideoDone,
    VideoOrder,
)
from parallel.comm.store import StoreServer
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout, Mesh
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import open_gang
from tests.models import downloaded
from tests.models.wan.small import small_pipeline
from tests.parallel.cluster.sources import SmallSource, size
from tests.parallel.small import request
from tests.waiting import until

MOST_WAITING = 8


def order(video, **what):
    made = request(**what)
    return VideoOrder(video=video, request=made, size=size(made, Layout(pp=1)))


class Controller:
    """It permits every quantum at once."""

    def __init__(self):
        self.received = []
        self.loop = CommandLoop()

    def receive(self, events):
        self.received.append(events)
        for event in events:
            if isinstance(event, QuantumReady):
                self.loop.handle(PermitQuantum(video=event.video, quantum=event.quantum))

    def all(self, kind):
        return [event for events in list(self.received) for event in events if isinstance(event, kind)]


@contextmanager
def running(source=None, controller=None):
    """A gang of one rank that makes the videos of a source, the small one if there is none; and its trace."""
    controller, failures, source = controller or Controller(), [], source or SmallSource()

    def work():
        torch.set_num_threads(1)
        at = StoreServer("127.0.0.1").address
        place = {"rank": 0, "world_size": 1, "local_rank": 0, "one_machine": True}
        env = RankEnv(**place, host=at.host, port=at.port, secret=at.secret, launcher_serves=True)
        layout = Layout(pp=1)
        try:
            with open_gang(env, layout, timeouts=Timeouts(silent=30.0), trace=True) as gang:
                controller.tracer = gang.tracer
                pipeline = source.lead(Mesh(layout=layout, rank=0), "cpu")
                with gang.lead(pipeline) as (engine, _):
                    controller.loop.run(engine, torch.device("cpu"), controller.receive)
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        until(lambda: controller.all(GangReady), "the gang is not ready")
        yield controller
    finally:
        controller.loop.handle(Finish())
        thread.join(20)
    assert not thread.is_alive() and not failures


def test_no_more_is_made_than_the_controller_can_take():
    """A controller that is busy writing files is not buried in chunks; the leader waits until it has stored them."""
    with running() as controller:
        controller.loop.handle(order("long", chunks=20))
        until(lambda: len(controller.all(ChunkMade)) >= MOST_WAITING, "it makes nothing")
        time.sleep(1.0)
        waiting = len(controller.all(ChunkMade))
        assert MOST_WAITING <= waiting <= MOST_WAITING + 4  # those that the same step has finished
        controller.loop.handle(ChunkTaken(video="long", index=waiting - 1))
        until(lambda: len(controller.all(ChunkMade)) > waiting, "it does not go on")
        controller.loop.handle(ChunkTaken(video="long", index=19))
        until(lambda: controller.all(VideoDone), "it does not end")
        assert [chunk.index for chunk in controller.all(ChunkMade)] == list(range(20))


def test_what_nobody_waits_for_goes_with_what_comes_next():
    """Every message costs the ranks time: with one video, a finished quantum is sent with the next chunk or quantum."""
    with running() as controller:
        controller.loop.handle(order("one", chunks=6))
        until(lambda: controller.all(VideoDone), "it does not end")
        assert len(controller.all(Admitted)) == 1
        assert len(controller.all(Progressed)) == len(controller.all(QuantumDone)) > 0
        for events in controller.received:
            assert not isinstance(events[-1], QuantumDone | Progressed), "a message of its own"


def test_a_cancelled_video_ends_and_the_next_is_made():
    with running() as controller:
        controller.loop.handle(order("unwanted", chunks=20))
        until(lambda: controller.all(ChunkMade), "it makes nothing")
        controller.loop.handle(ChunkTaken(video="unwanted", index=0))
        controller.loop.handle(CancelVideo(video="unwanted"))
        controller.loop.handle(order("wanted", chunks=2))
        until(lambda: controller.all(VideoDone), "it does not end")
        assert [done.video for done in controller.all(VideoDone)] == ["wanted"]


def test_commands_for_videos_that_are_gone_are_ignored():
    with running() as controller:
        for command in (
            PermitQuantum(video="gone", quantum=3),
            ChunkTaken(video="gone", index=1),
            CancelVideo(video="gone"),
            ChangePrompt(video="gone", first=1, prompt="a thing"),
        ):
            controller.loop.handle(command)
        controller.loop.handle(order("here", chunks=1))
        until(lambda: controller.all(VideoDone), "it does not end")


class SlowReader(SmallSource):
    """It takes its time with a prompt."""

    def lead(self, mesh, device):
        pipeline = super().lead(mesh, device)
        captions = pipeline.captions

        def slowly(prompt):
            time.sleep(0.3)
            return captions(prompt)

        pipeline.captions = slowly
        return pipeline


class Changing(Controller):
    """It changes the prompt and permits the next chunk in one breath."""

    def receive(self, events):
        for event in events:
            if isinstance(event, QuantumReady) and event.quantum in (0, 2):
                text = f"another thing {event.quantum}"
                self.loop.handle(ChangePrompt(video=event.video, first=event.quantum, prompt=text))
        super().receive(events)


def test_a_chunk_that_is_permitted_waits_for_its_new_prompt():
    script = ((2, "another thing 2"),)
    with running(SlowReader(), Changing()) as controller:
        controller.loop.handle(order("changed", chunks=4))
        until(lambda: controller.all(VideoDone), "it does not end")
        changed = controller.all(ChunkMade)
    with running() as controller:
        controller.loop.handle(order("whole", chunks=4, prompt="another thing 0", script=script))
        until(lambda: controller.all(VideoDone), "it does not end")
        whole = controller.all(ChunkMade)
    assert len(changed) == 4
    for one, other in zip(changed, whole, strict=True):
        assert (one.latents == other.latents).all()


@pytest.mark.slow
def test_two_prompts_load_t5_once_and_the_second_is_read_beside_the_work(tmp_path, monkeypatch):
    """A real T5, which takes its time with a prompt. The trace has passes of the first video all the while."""
    from transformers import T5EncoderModel

    loads, load, reads, encode = [], T5EncoderModel.from_pretrained, [], T5Encoder.encode

    def counting(folder, **how):
        loads.append(folder)
        return load(folder, **how)

    def slowly(encoder, prompt):
        began, made = time.time(), encode(encoder, prompt)
        time.sleep(0.5)
        reads.append((began, time.time()))
        return made

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", counting)
    monkeypatch.setattr(T5Encoder, "encode", slowly)
    folder = downloaded.download(tmp_path, "4.5B_distill")
    config = downloaded.small_config("4.5B_distill")
    source = Source(loader=MagiLoader(config=config, weights=folder, text=T5Loading()))
    one = {"height": downloaded.SIDE, "width": downloaded.SIDE, "num_steps": 32}
    first, second = order("first", prompt="a cat", chunks=7, **one), order("second", prompt="a dog", chunks=1, **one)
    with running(source) as controller:
        controller.loop.handle(first)
        until(lambda: controller.all(QuantumDone), "it makes nothing")
        controller.loop.handle(second)
        until(lambda: len(controller.all(VideoDone)) == 2, "they do not end", seconds=60)
    assert len(loads) == 1 and len(reads) == 2
    spans = [event for event in map(json.loads, controller.tracer.lines()) if event.get("cat") == "compute"]
    began, ended = (moment * 1e6 for moment in reads[1])
    meanwhile = [span["ts"] for span in spans if began < span["ts"] < ended]
    assert len(meanwhile) > 20 and {span["args"]["request"] for span in spans if span["ts"] < ended} == {0}
    gaps = [later - earlier for earlier, later in zip([began, *meanwhile], [*meanwhile, ended], strict=True)]
    assert max(gaps) < (ended - began) / 2


class GroupSource:
    """A small model whose long videos are made in spans."""

    identity = "groups"
    runtime = {"chunk_width": 2, "stagger": 2, "window_frames": 8, "overlap_frames": 2}

    def lead(self, mesh, device):
        return small_pipeline(**self.runtime)


def test_a_long_video_is_counted_through_all_its_spans():
    """Permits are for the quanta of all spans, each given back at its end, and a viewer's map has all chunks."""
    made = request(num_steps=6, chunks=7)
    config = small_pipeline(**GroupSource.runtime).config
    size = video_size(config, made, reuse=ReuseSettings(), kv=KVSettings(), layout=Layout(pp=1))
    assert size.chunks == 7 and [span.chunks for span in size.schedule.spans] == [4, 4]
    with running(GroupSource()) as controller:
        controller.loop.handle(VideoOrder(video="long", request=made, size=size, watched=True))
        until(lambda: controller.all(VideoDone), "it does not end", seconds=60)
    assert [one.index for one in controller.all(ChunkMade)] == list(range(7))
    quanta = list(range(size.schedule.quanta))
    assert [one.quantum for one in controller.all(QuantumDone)] == quanta
    assert [one.quantum for one in controller.all(QuantumReady)] == quanta
    live = Live(SimpleNamespace(plan=SimpleNamespace(size=size)))
    seen = []
    for ticked in controller.all(Ticked):
        live.ticked(ticked)
        seen.append(live.percent)
    _, shown = live.snapshot()
    assert shown["rows"] == ["cccccc"] * 7 and shown["tick"] == shown["ticks"] == len(seen)
    assert seen == sorted(set(seen)) and seen[-1] == 100

"""Messages between two ranks: order, back pressure, who may touch payloads, and what ends a gang."""

import json
import queue
import threading
import time
from collections import defaultdict

import pytest
import torch

from parallel.comm.channel import AHEAD, Inbox, Link, Outbox
from parallel.comm.messages import HEADER_BYTES, Header, Kind
from parallel.health.failure import GangError
from tests.parallel.on_ranks import run, start
from tests.parallel.ranks.test_pipeline import close, same
from tests.waiting import until

OWN = pytest.mark.parametrize("inline", [True, False], ids=["in the header's buffer", "by themselves"])


class _Received:
    def __init__(self, tensor, source):
        self._tensor, self._source = tensor, source

    def wait(self):
        content = self._source()
        if isinstance(content, BaseException):
            raise content
        self._tensor.copy_(content)


class _Sent:
    def wait(self):
        pass


class LocalTransport:
    """What one end sends the other receives, by tag; `log` has (what, thread, address, bytes)."""

    def __init__(self):
        self.content, self.log = defaultdict(queue.SimpleQueue), []

    def send(self, tensor, tag):
        self._note("send", tensor)
        self.content[tag].put(tensor.clone())
        return _Sent()

    def receive(self, tensor, tag):
        self._note("receive", tensor)
        return _Received(tensor, self.content[tag].get)

    def _note(self, what, tensor):
        self.log.append((what, threading.current_thread(), tensor.data_ptr(), tensor.nbytes))


def local_link(payloads=None, device="cpu"):
    return Link(peer=1, key=b"", headers=LocalTransport(), payloads=payloads, device=torch.device(device))


def no_error(peer, error):
    raise AssertionError(f"rank {peer}: {error}")


def inbox_of(link, *, limit=AHEAD, on_error=no_error):
    return Inbox(link, on_error, lambda: None, limit=limit)


def item(index, size=8):
    return Header(kind=Kind.ITEM, request=index), torch.full((1, size, 4), float(index))


@pytest.mark.slow
@pytest.mark.alone
@OWN
def test_a_slow_receiver_gets_everything_in_order_and_does_not_block_the_sender(tmp_path, inline):
    out = tmp_path / "seen.json"
    start(out, "flood", {"inline": inline}, pp=2)
    assert json.loads(out.read_text()) == [[index, 50 + index // 10, float(index)] for index in range(40)]
    sending, whole = json.loads((tmp_path / "seen.json.seconds").read_text())
    assert sending < 0.3 < 0.5 < whole  # the receiver takes 40 x 0.02 s, of which the last few can be on their way


@OWN
def test_messages_are_received_as_they_were_sent(inline):
    link = local_link(None if inline else LocalTransport())
    outbox, inbox = Outbox(link, no_error), inbox_of(link, limit=None)
    sizes = [8, 8, 8, 5, 5, 0, 5, 8]
    for index, size in enumerate(sizes):
        outbox.send(*item(index, size))
    outbox.send(Header(kind=Kind.RELEASE, request=9))
    outbox.send(Header(kind=Kind.CHECKPOINT, request=9), torch.arange(7, dtype=torch.uint8))
    outbox.send(Header(kind=Kind.LEAVE))
    for index, size in enumerate(sizes):
        message = inbox.receive()
        assert (message.header.number, message.header.request) == (index, index)
        assert torch.equal(message.payload, item(index, size)[1])
        assert message.nbytes == HEADER_BYTES + size * 16
    assert inbox.receive().payload is None
    assert inbox.receive().payload.tolist() == list(range(7))
    assert inbox.receive().header.kind is Kind.LEAVE
    assert outbox.sent_bytes >= len(sizes) * HEADER_BYTES + sum(sizes) * 16


def test_a_payload_of_the_same_size_is_in_the_buffer_of_its_header():
    link = local_link()
    outbox, inbox = Outbox(link, no_error), inbox_of(link)
    for index in range(4):
        outbox.send(*item(index))
        inbox.receive()
    sent = [nbytes for what, _, _, nbytes in link.headers.log if what == "send"]
    assert sent == [128, HEADER_BYTES, *[HEADER_BYTES + 128] * 3] or sent == [
        HEADER_BYTES,
        128,
        *[HEADER_BYTES + 128] * 3,
    ]


def test_payloads_are_begun_on_the_main_thread_and_at_most_two_ahead():
    """The rule that keeps memory right on a GPU: the stream that is current on the main thread orders a receive after
    all earlier uses of its memory. A receive that another thread begins is ordered after nothing."""
    payloads = LocalTransport()
    link = local_link(payloads)
    outbox, inbox = Outbox(link, no_error), inbox_of(link)
    for index in range(8):
        outbox.send(*item(index))
    until(lambda: inbox._arrived.qsize() > AHEAD)
    for index in range(8):
        message = inbox.receive()
        begun = [entry for entry in payloads.log if entry[0] == "receive"]
        assert index + 1 <= len(begun) <= index + 1 + AHEAD
        assert torch.equal(message.payload, item(index)[1])
    assert {thread for _, thread, _, _ in payloads.log} == {threading.current_thread()}
    assert threading.current_thread() not in {thread for what, thread, _, _ in link.headers.log}


def test_memory_of_the_next_payload_is_allocated_before_the_present_one_is_handed_out():
    """It is not that of the present payload, and was not freed by the caller after it had been handed out."""
    payloads = LocalTransport()
    link = local_link(payloads)
    outbox, inbox = Outbox(link, no_error), inbox_of(link)
    outbox.send(*item(0, 1 << 12))
    message = inbox.receive()
    address = message.payload.data_ptr()
    waiting = inbox._next._tensor.data_ptr()
    assert address != waiting
    outbox.send(*item(1, 1 << 12))
    following = inbox.receive()
    assert following.payload.data_ptr() == waiting
    assert torch.equal(message.payload, item(0, 1 << 12)[1])


def test_a_full_inbox_leaves_messages_with_the_sender():
    link = local_link()
    outbox, inbox = Outbox(link, no_error), inbox_of(link)
    for index in range(12):
        outbox.send(*item(index))
    time.sleep(0.2)
    received = len([entry for entry in link.headers.log if entry[0] == "receive"])
    assert received <= AHEAD + 2  # one more for the payload of the first, which came by itself
    assert inbox.receive().header.request == 0


def test_a_message_that_is_out_of_step_is_an_error_that_names_the_peer():
    link, errors = local_link(), queue.SimpleQueue()
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    Header(kind=Kind.RELEASE).write(buffer, 5, b"")
    link.headers.send(buffer, 0)
    inbox_of(link, on_error=lambda *error: errors.put(error))
    peer, error = errors.get(timeout=5)
    assert peer == 1
    assert "message 5 was received in place of message 0" in str(error)


def test_bytes_that_are_no_header_are_an_error_that_names_the_peer():
    link, errors = local_link(), queue.SimpleQueue()
    link.headers.send(torch.full((HEADER_BYTES,), 7, dtype=torch.uint8), 0)
    inbox_of(link, on_error=lambda *error: errors.put(error))
    peer, error = errors.get(timeout=5)
    assert (peer, type(error)) == (1, ValueError)


@pytest.mark.parametrize(
    "error", [KeyError("a"), MemoryError(), SystemExit(3), RuntimeError("Connection closed by peer")]
)
def test_whatever_ends_a_thread_is_reported(error):
    link, errors = local_link(), queue.SimpleQueue()
    link.headers.content[0].put(error)
    inbox_of(link, on_error=lambda *reported: errors.put(reported))
    assert errors.get(timeout=5) == (1, error)

    def fail(tensor, tag):
        raise error

    link.headers.send = fail
    outbox = Outbox(link, lambda *reported: errors.put(reported))
    outbox.send(Header(kind=Kind.RELEASE))
    assert errors.get(timeout=5) == (1, error)


@pytest.mark.slow
def test_a_thread_that_dies_of_any_error_ends_the_gang_with_one_line(tmp_path):
    with pytest.raises(GangError, match=r"rank 0 \(stage 0 of 2\): messages from or to rank 1: KeyError: 'a lost key'"):
        start(tmp_path / "out", "lost_key", {}, pp=2)


@pytest.mark.slow
def test_payloads_by_themselves_make_the_same_video(tmp_path):
    """Over gloo, payloads move as between GPUs: bit for bit what comes with payloads in the buffers of headers."""
    values = {"pp": 2, "cp": 2, "requests": [{"prefix": 32}], "config": {"guided": True}}
    same(*(run(tmp_path, inline=inline, **values)["latents"] for inline in (False, True)))


class StreamCopies:
    """A transport on one GPU that copies as NCCL does: on a stream of its own, after what was current when it began."""

    def __init__(self, device):
        self._stream, self.sent = torch.cuda.Stream(device), queue.SimpleQueue()

    def send(self, tensor, tag):
        return self._begin(lambda: self.sent.put(tensor.clone()))

    def receive(self, tensor, tag):
        return self._begin(lambda: tensor.copy_(self.sent.get(timeout=5)))

    def _begin(self, work):
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
            return self._stream.record_event()  # `wait` makes the stream that is current then wait


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_receive_does_not_overwrite_memory_that_queued_kernels_still_read():
    """While the compute stream is busy, payloads are received into memory that was freed just now, but whose last reads
    are queued behind a long kernel.

    It failed when the inbox's thread allocated the payload and received it on a stream of its own: that stream did not
    wait for the compute stream, so the copy was done before the reads of what had been there.
    """
    device = torch.device("cuda", 0)
    link = local_link(StreamCopies(device), device)
    outbox, inbox = Outbox(link, no_error), inbox_of(link)
    size = 1 << 20
    sums, expected = [], []
    for index in range(12):
        outbox.send(Header(kind=Kind.ITEM, request=index), torch.full((1, size, 4), float(index), device=device))
        message = inbox.receive()
        older = torch.full((1, size, 4), 100.0 + index, device=device)
        torch.cuda._sleep(50_000_000)  # some tens of milliseconds
        sums += [message.payload.double().mean(), older.double().mean()]
        expected += [float(index), 100.0 + index]
        del message, older  # the memory is free for what is received next; its reads are not done
    assert torch.stack(sums).tolist() == expected


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("pp", "cp"), [(2, 1), (1, 2)])
def test_two_gpus_make_the_video_of_one(tmp_path, pp, cp):
    """Over NCCL: bit for bit with two stages; with two ranks of a stage, whose sums are in another order, to 1e-5."""
    values = {"requests": [{}, {"prefix": 32, "seed": 8}], "concurrency": 2, "device": "cuda"}
    one, two = run(tmp_path, **values), run(tmp_path, pp=pp, cp=cp, **values)
    assert two["transfer"] == "nccl"
    (same if cp == 1 else close)(two["latents"], one["latents"])

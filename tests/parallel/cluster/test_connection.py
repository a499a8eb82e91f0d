"""Lines between the driver and ranks, over real sockets: order, arrays, ends, and callers who should not be there."""

import os
import socket
import threading
import time

import numpy as np
import pytest

from parallel.cluster.connection import Exchange, Line, dial

HOST = "127.0.0.1"


@pytest.fixture
def exchange():
    made = Exchange(HOST)
    yield made
    made.close()


class End:
    """A rank's end of a line."""

    def __init__(self, call):
        self.heard, self.over = [], threading.Event()
        self.line = Line(dial(call))
        self.line.listen(self.heard.append, self.over.set)


def until(condition, what, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def taken(exchange, peer, count):
    """So many messages, waiting as the driver does."""
    found, deadline = [], time.monotonic() + 10
    while len(found) < count:
        assert exchange.news.wait(deadline - time.monotonic()), f"{len(found)} of {count} messages came"
        exchange.news.clear()
        found += peer.take()
    return found


def line_threads():
    return [thread for thread in threading.enumerate() if thread.name in ("line-in", "line-out", "caller")]


def test_messages_come_whole_and_in_order_both_ways(exchange):
    peer, call = exchange.expect()
    assert not peer.here
    end = End(call)
    arrays = [np.arange(n, dtype=np.float32).reshape(2, -1) for n in (0, 6, 600_000)]
    for number, array in enumerate(arrays):
        end.line.send({"number": number, "array": array})
    came = taken(exchange, peer, 3)
    assert [one["number"] for one in came] == [0, 1, 2]
    assert all(np.array_equal(one["array"], array) for one, array in zip(came, arrays, strict=True))
    assert peer.here and not peer.gone and peer.take() == []
    for number in range(100):
        peer.send(number)
    until(lambda: len(end.heard) == 100, "not all came")
    assert end.heard == list(range(100))
    end.line.close()


def test_what_was_said_before_hanging_up_is_heard(exchange):
    peer, call = exchange.expect()
    end = End(call)
    for number in range(50):
        end.line.send(np.full(100_000, number))
    end.line.close(flush=10.0)
    until(lambda: peer.gone, "nobody noticed the end")
    assert [int(one[0]) for one in peer.take()] == list(range(50))
    assert exchange.news.is_set()


def test_a_rank_that_is_cut_off_is_gone_at_once(exchange):
    """As when its process is killed: the system closes the socket, in the middle of a message or not."""
    peer, call = exchange.expect()
    connection = dial(call)
    os.write(connection.fileno(), b"\0\0")  # the beginning of a message
    until(lambda: peer.here, "it was not put through")
    connection.close()
    until(lambda: peer.gone, "nobody noticed the end", seconds=2.0)
    assert peer.take() == []


def test_nobody_waits_for_an_end_that_does_not_listen(exchange):
    """A stopped rank takes nothing in; telling it things, and giving it up, take no time, and no thread is left."""
    before = len(line_threads())
    peer, call = exchange.expect()
    connection = dial(call)
    until(lambda: peer.here, "it was not put through")
    began = time.monotonic()
    for _ in range(20):
        peer.send(np.zeros(5_000_000))
    peer.close()
    assert time.monotonic() - began < 1.0
    until(lambda: len(line_threads()) <= before, "threads are left")
    connection.close()


def test_who_has_no_key_is_turned_away_and_who_says_nothing_holds_up_nobody(exchange):
    peer, call = exchange.expect()
    silent = socket.create_connection((HOST, call.port))
    stranger = socket.create_connection((HOST, call.port))
    stranger.sendall(b"\0\0\0\x20" + bytes(32))
    assert stranger.recv(1) == b""
    end = End(call)
    end.line.send("here")
    assert taken(exchange, peer, 1) == ["here"]
    again = dial(call)  # a key opens the line once
    with pytest.raises((EOFError, ConnectionError)):
        again.recv_bytes()
    for one in (silent, stranger, again):
        one.close()
    end.line.close()


def test_a_rank_that_was_given_up_before_it_called_is_hung_up(exchange):
    peer, call = exchange.expect()
    peer.close()
    end = End(call)
    assert end.over.wait(5.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_cannot_be_sent_ends_the_line(exchange):
    """In place of a rank that waits for an answer which never comes."""
    before = len(line_threads())
    peer, call = exchange.expect()
    end = End(call)
    end.line.send(threading.Lock())
    assert end.over.wait(5.0)
    until(lambda: peer.gone, "nobody noticed the end")
    until(lambda: len(line_threads()) <= before, "threads are left")


def test_a_closed_exchange_leaves_open_lines_alone_and_takes_no_calls():
    made = Exchange(HOST)
    peer, call = made.expect()
    _, late = made.expect()
    end = End(call)
    until(lambda: peer.here, "it was not put through")
    made.close()
    assert not any(thread.name == "exchange" for thread in threading.enumerate())
    with pytest.raises(OSError):
        dial(late)
    end.line.send("still there")
    until(lambda: peer.take() == ["still there"], "it did not come")
    end.line.close()


def test_ipv6():
    try:
        made = Exchange("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    peer, call = made.expect()
    end = End(call)
    end.line.send(1)
    assert taken(made, peer, 1) == [1]
    end.line.close()
    made.close()

"""Connections between the controller and ranks, over real sockets: order, arrays, ends, and callers to be refused."""

import os
import pickle
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp

import numpy as np
import pytest

from parallel.cluster.connection import Connection, connect
from parallel.cluster.messages import ChunkMade, Finish, MessageError, PermitQuantum
from parallel.comm.sockets import Listener, NotAuthenticated
from tests.waiting import until

HOST = "127.0.0.1"


class Gang:
    """The controller's ends of the connections of a gang's ranks, by number."""

    def __init__(self, host=HOST):
        self.news, self.peers = threading.Event(), {}
        self.listener = Listener(host, "a secret", self.opened, patience=1.0)

    def opened(self, number, stream):
        self.peers[number].connection.open(stream)


@pytest.fixture
def listener():
    made = Gang()
    yield made
    made.listener.close()


class End:
    """One end of a connection: what it has received, and how it ended."""

    def __init__(self):
        self.received, self.ended, self.error, self.connection = [], threading.Event(), None, None

    def end(self, error):
        self.error = error
        self.ended.set()

    def take(self):
        taken, self.received = self.received, []
        return taken

    @property
    def gone(self):
        return self.ended.is_set()

    @property
    def connected(self):
        return self.connection._stream is not None


def expect(listener):
    """The controller's end, and where and as which rank the other one is to connect."""

    def receive(message):
        peer.received.append(message)
        listener.news.set()

    peer, number = End(), len(listener.peers)
    peer.connection = Connection(receive, peer.end)
    listener.peers[number] = peer
    return peer, (listener.listener.address, number)


def rank(place):
    """The rank's end."""
    made = End()
    made.connection = connect(*place, made.received.append, made.end)
    return made


def taken(listener, peer, count):
    """So many messages, waiting as the controller does."""
    found, deadline = [], time.monotonic() + 10
    while len(found) < count:
        assert listener.news.wait(deadline - time.monotonic()), f"{len(found)} of {count} messages came"
        listener.news.clear()
        found += peer.take()
    return found


def threads():
    names = ("connection-receive", "connection-send", "caller")
    return [thread for thread in threading.enumerate() if thread.name in names]


def chunk(index, *shape):
    latents = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return ChunkMade(video="a", index=index, frames=latents.astype(np.uint8), latents=latents)


def authenticated(place):
    """A raw connection of somebody who knows the secret."""
    address, number = place
    raw = mp.Connection(socket.create_connection((address.host, address.port)).detach())
    mp.answer_challenge(raw, address.secret.encode())
    mp.deliver_challenge(raw, address.secret.encode())
    raw.send_bytes(struct.pack("<q", number))
    return raw


def test_messages_come_whole_and_in_order_both_ways(listener):
    peer, address = expect(listener)
    assert not peer.connected
    end = rank(address)
    sent = [chunk(0, 2, 0), chunk(1, 2, 3), chunk(2, 2, 300_000)]
    for one in sent:
        end.connection.send([one])
    came = [one for (one,) in taken(listener, peer, 3)]
    assert [one.index for one in came] == [0, 1, 2]
    for one, other in zip(came, sent, strict=True):
        assert one.latents.dtype == np.float32 and np.array_equal(one.latents, other.latents)
        assert one.frames.dtype == np.uint8 and np.array_equal(one.frames, other.frames)
    assert peer.connected and not peer.gone and peer.take() == []
    for number in range(100):
        peer.connection.send(PermitQuantum(video="a", quantum=number))
    until(lambda: len(end.received) == 100, "not all came")
    assert [one.quantum for one in end.received] == list(range(100))
    end.connection.close()


def test_small_messages_leave_at_once(listener):
    peer, address = expect(listener)
    end = rank(address)
    until(lambda: peer.connected, "it was not taken")
    for own in (end.connection._stream, peer.connection._stream):
        assert own.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    end.connection.close()


def test_what_was_sent_before_the_end_is_received(listener):
    peer, address = expect(listener)
    end = rank(address)
    for number in range(50):
        end.connection.send(chunk(number, 100_000))
    end.connection.close(flush=10.0)
    until(lambda: peer.gone, "nobody noticed the end")
    assert [one.index for one in peer.take()] == list(range(50))
    assert listener.news.is_set() and peer.error is None


def test_a_rank_that_is_cut_off_is_gone_at_once(listener):
    """As when its process is killed: the system closes the socket, in the middle of a message or not."""
    peer, address = expect(listener)
    raw = authenticated(address)
    os.write(raw.fileno(), b"\0\0")  # the beginning of a message
    until(lambda: peer.connected, "it was not taken")
    raw.close()
    until(lambda: peer.gone, "nobody noticed the end", seconds=2.0)
    assert peer.take() == [] and peer.error is None


def test_nobody_waits_for_an_end_that_does_not_listen(listener):
    """A stopped rank takes nothing in; sending to it, and giving it up, take no time, and no thread is left."""
    before = len(threads())
    peer, address = expect(listener)
    raw = authenticated(address)
    until(lambda: peer.connected, "it was not taken")
    began = time.monotonic()
    for number in range(20):
        peer.connection.send(chunk(number, 5_000_000))
    peer.connection.close()
    assert time.monotonic() - began < 30  # who waits for it waits for ever
    until(lambda: len(threads()) <= before, "threads are left")
    raw.close()


def test_a_caller_that_says_nothing_is_dropped_and_holds_up_nobody(listener):
    port = listener.listener.address.port
    silent, slow = (socket.create_connection((HOST, port)) for _ in range(2))
    slow.sendall(b"\0\0")
    peer, address = expect(listener)
    end = rank(address)
    end.connection.send(Finish())
    began = time.monotonic()
    assert taken(listener, peer, 1) == [Finish()]
    assert time.monotonic() - began < 5.0, "it waited for the silent one"
    for one in (silent, slow):
        one.settimeout(5.0)
        while one.recv(1024):
            pass  # the challenge, and then the end
        one.close()
    assert peer.connected and not peer.gone
    end.connection.close()


def test_a_caller_without_the_secret_is_refused_and_a_rank_has_one_connection(listener):
    peer, (address, number) = expect(listener)
    for wrong in ("", "another secret"):
        with pytest.raises(NotAuthenticated):
            connect(replace(address, secret=wrong), number, print, print)
    assert not peer.connected
    end, second = rank((address, number)), rank((address, number))
    assert second.ended.wait(5.0) or end.ended.wait(5.0)
    assert second.gone != end.gone and not peer.gone
    end.connection.close()
    second.connection.close()


def test_a_rank_does_not_talk_to_somebody_who_does_not_know_the_key():
    """As when another process has got the controller's port meanwhile."""
    server = socket.create_server((HOST, 0))
    _, (address, number) = expect(Gang())

    def pretend():
        raw = mp.Connection(server.accept()[0].detach())
        with suppress(AuthenticationError, OSError, EOFError):
            mp.deliver_challenge(raw, bytes(32))

    thread = threading.Thread(target=pretend, daemon=True)
    thread.start()
    with pytest.raises(OSError):
        connect(replace(address, port=server.getsockname()[1]), number, print, print)
    thread.join(5)
    server.close()


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_a_pickle_does_nothing_but_end_the_connection(listener, tmp_path):
    bomb = Bomb()
    bomb.place = str(tmp_path / "went off")
    for payload in (pickle.dumps(bomb), b"{}" + pickle.dumps(bomb)):
        peer, address = expect(listener)
        raw = authenticated(address)
        raw.send_bytes(payload)
        until(lambda peer=peer: peer.gone, "the connection is still there")
        assert peer.take() == [] and isinstance(peer.error, MessageError)
        with pytest.raises((EOFError, OSError)):
            raw.recv_bytes()
        raw.close()
    assert not (tmp_path / "went off").exists()


def test_what_cannot_be_sent_ends_the_connection_and_is_reported(listener):
    """In place of a rank that waits for an answer which never comes."""
    before = len(threads())
    peer, address = expect(listener)
    end = rank(address)
    end.connection.send(threading.Lock())
    assert end.ended.wait(5.0)
    assert isinstance(end.error, MessageError)
    until(lambda: peer.gone, "nobody noticed the end")
    until(lambda: len(threads()) <= before, "threads are left")


def test_an_error_of_who_receives_ends_the_connection_and_is_reported(listener):
    peer, address = expect(listener)
    errors = []
    connect(*address, lambda message: message.missing, errors.append)
    until(lambda: peer.connected, "it was not taken")
    peer.connection.send(PermitQuantum(video="a", quantum=0))
    until(lambda: peer.gone and errors, "nobody noticed the end")
    assert isinstance(errors[0], AttributeError)


def test_a_rank_that_was_given_up_before_it_connected_is_disconnected(listener):
    peer, address = expect(listener)
    peer.connection.close()
    end = rank(address)
    assert end.ended.wait(5.0)


def test_a_closed_listener_leaves_connections_alone_and_takes_no_others():
    made = Gang()
    peer, address = expect(made)
    _, late = expect(made)
    end = rank(address)
    until(lambda: peer.connected, "it was not taken")
    made.listener.close()
    assert not made.listener._thread.is_alive()
    with pytest.raises(OSError):
        connect(*late, print, print)
    end.connection.send(Finish())
    until(lambda: peer.take() == [Finish()], "it did not come")
    end.connection.close()


def test_ipv6():
    try:
        made = Gang("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    peer, address = expect(made)
    end = rank(address)
    end.connection.send(Finish())
    assert taken(made, peer, 1) == [Finish()]
    end.connection.close()
    made.listener.close()

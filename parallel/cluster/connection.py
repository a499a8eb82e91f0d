"""Connections between the controller and ranks: messages over TCP, one connection for each rank.

The controller listens, the ranks connect. Both ends prove that they know a secret of this one connection (the challenge
of `multiprocessing.connection`); the secret goes to the rank through Ray, not over the connection. What is sent after
that is not encrypted. Messages are plain data (`messages.py`), so a message runs no code.

Ray starts ranks and sees them die. Messages do not go through it: a call of an actor keeps several processes busy for a
millisecond, and an actor that takes calls while it works wakes a hundred times a second for that.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp
from queue import SimpleQueue
from typing import Any

from parallel.cluster.messages import decode, encode
from parallel.health.timeouts import ACCEPT_AGAIN_SECONDS, AUTHENTICATE_SECONDS, CONNECT_SECONDS

_NUMBER = struct.Struct("<Q")
_KEY_BYTES = 32
OnMessage = Callable[[Any], None]
OnEnd = Callable[[Exception | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """How one rank reaches the controller."""

    host: str  # of the controller
    port: int  # where it listens
    number: int  # of the connection
    key: bytes  # which both ends must know; nobody else does


def connect(address: Address, on_message: OnMessage, on_end: OnEnd) -> Connection:
    """Connect to the controller, with functions for `Connection`; an OSError if it cannot be reached or is another."""
    own = socket.create_connection((address.host, address.port), timeout=CONNECT_SECONDS)
    stream = _stream(own)
    try:
        with _time_limit(own, AUTHENTICATE_SECONDS):
            stream.send_bytes(_NUMBER.pack(address.number))
            mp.answer_challenge(stream, address.key)
            mp.deliver_challenge(stream, address.key)
    except (EOFError, AuthenticationError, AssertionError):
        raise ConnectionError("it does not know this rank") from None
    connection = Connection(on_message, on_end)
    connection.open(own, stream)
    return connection


class Connection:
    """One end of a connection. Nobody waits for the other end: one thread sends and another one receives.

    Args:
        on_message: called with every message, on a thread of the connection.
        on_end: called once, when nothing more can come; with the error if the connection has ended for another reason
            than that the other end has closed it, or is gone.
    """

    def __init__(self, on_message: OnMessage, on_end: OnEnd) -> None:
        self._on_message, self._on_end = on_message, on_end
        self.closed = False
        self._error: Exception | None = None
        self._outbox: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self._socket: socket.socket | None = None
        self._sender: threading.Thread | None = None

    def open(self, own: socket.socket, stream: mp.Connection) -> None:
        """Send and receive from now on, through an authenticated stream of a socket."""
        self._socket = own
        self._sender = threading.Thread(target=self._send, args=(stream,), name="connection-send", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, args=(stream,), name="connection-receive", daemon=True).start()
        if self.closed:
            self.close()

    def send(self, message: object) -> None:
        """Have a message sent after those before it; it is lost if the connection has ended."""
        self._outbox.put((message,))

    def close(self, *, flush: float = 0.0) -> None:
        """End the connection, also one that is not open yet; waits `flush` seconds for messages to be on their way."""
        self.closed = True
        self._outbox.put(None)
        if self._sender is not None:
            self._sender.join(flush)
        _shut_down(self._socket)

    def _send(self, stream: mp.Connection) -> None:
        try:
            while (entry := self._outbox.get()) is not None:
                text, arrays = encode(entry[0])
                stream.send_bytes(text)
                for array in arrays:
                    stream.send_bytes(array.reshape(-1).view("u1").data)
        except OSError:
            pass  # the other end is gone, which the other thread finds, too
        except Exception as error:  # noqa: BLE001 - `on_end` reports it
            self._error = self._error or error
            _shut_down(self._socket)

    def _receive(self, stream: mp.Connection) -> None:
        try:
            while True:
                self._on_message(decode(stream.recv_bytes(), stream.recv_bytes))
        except (EOFError, OSError):
            pass  # the other end is gone
        except Exception as error:  # noqa: BLE001 - `on_end` reports it
            self._error = self._error or error
        finally:
            self._outbox.put(None)
            _shut_down(self._socket)
            self._on_end(self._error)


class Listener:
    """Takes the connections of ranks, at an address of this machine that they can reach.

    A caller that has not authenticated after `patience` seconds is dropped, and holds up no other one.
    """

    def __init__(self, host: str, *, patience: float = AUTHENTICATE_SECONDS) -> None:
        self.news = threading.Event()
        """Set after every message and every end of a connection; the thread that waits for it clears it."""
        self._host, self._patience, self._closed = host, patience, False
        self._expected: dict[int, tuple[bytes, Connection]] = {}
        self._numbers = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=256)
        self._port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._thread.start()

    def expect(self, on_message: OnMessage, on_end: OnEnd) -> tuple[Connection, Address]:
        """A connection that is not open yet, and how the rank opens it; the functions are those of `Connection`."""

        def with_news(function: Callable[[Any], None]) -> Callable[[Any], None]:
            def call(value: Any) -> None:
                function(value)
                self.news.set()

            return call

        connection, key = Connection(with_news(on_message), with_news(on_end)), secrets.token_bytes(_KEY_BYTES)
        for number, (_, other) in list(self._expected.items()):
            if other.closed:
                self._expected.pop(number, None)
        self._numbers += 1
        self._expected[self._numbers] = key, connection
        return connection, Address(host=self._host, port=self._port, number=self._numbers, key=key)

    def close(self) -> None:
        """Take no more connections; those that are open stay."""
        self._closed = True
        with suppress(OSError):
            socket.create_connection((self._host, self._port)).close()  # wakes the thread
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                caller, _ = self._socket.accept()
                threading.Thread(target=self._admit, args=(caller,), name="caller", daemon=True).start()
            except (OSError, RuntimeError):  # too many open files, or threads, which may pass
                time.sleep(ACCEPT_AGAIN_SECONDS)

    def _admit(self, caller: socket.socket) -> None:
        """Authenticate a caller, and open its connection."""
        stream = _stream(caller)
        with suppress(EOFError, OSError, AuthenticationError, AssertionError), _time_limit(caller, self._patience):
            (number,) = _NUMBER.unpack(stream.recv_bytes(_NUMBER.size).ljust(_NUMBER.size))
            if (expected := self._expected.get(number)) is not None:
                key, connection = expected
                mp.deliver_challenge(stream, key)
                mp.answer_challenge(stream, key)
                if self._expected.pop(number, None) is not None:
                    return connection.open(caller, stream)
        _shut_down(caller)


def _stream(own: socket.socket) -> mp.Connection:
    """Messages on a connected socket. Small ones leave at once."""
    own.settimeout(None)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return mp.Connection(os.dup(own.fileno()))


def _shut_down(own: socket.socket | None) -> None:
    """End a socket: all threads that wait for it, on both ends, go on."""
    if own is not None:
        with suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)


@contextmanager
def _time_limit(own: socket.socket, seconds: float) -> Iterator[None]:
    """Shut a socket down if what is done within takes longer."""
    timer = threading.Timer(seconds, _shut_down, (own,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

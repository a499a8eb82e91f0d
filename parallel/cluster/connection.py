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
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp
from queue import SimpleQueue
from typing import Any

from parallel.cluster.messages import decode, encode

_CONNECT, _AUTHENTICATE, _PAUSE = 30.0, 10.0, 0.1
_NUMBER = struct.Struct("<Q")
_KEY_BYTES = 32
_REFUSED = (EOFError, OSError, AuthenticationError, AssertionError)
"""What the challenge raises when the other end hangs up, is too slow, does not know the key or says something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """How one rank reaches the controller."""

    host: str  # of the controller
    port: int  # where it listens
    number: int  # of the connection
    key: bytes  # which both ends must know; nobody else does


def connect(address: Address) -> Connection:
    """Connect to the controller.

    Raises:
        OSError: it cannot be reached, or it is another one.
    """
    connection = Connection(socket.create_connection((address.host, address.port), timeout=_CONNECT))
    try:
        connection.call(address.number, address.key)
    except (EOFError, AuthenticationError, AssertionError):
        raise ConnectionError("it does not know this rank") from None
    return connection


class Connection:
    """One end of a connection. Nobody waits for the other end: one thread sends and another one receives.

    Args:
        own: connected socket. Small messages leave at once.
    """

    def __init__(self, own: socket.socket) -> None:
        own.settimeout(None)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._stream = own, mp.Connection(os.dup(own.fileno()))
        self._outbox: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="connection-send", daemon=True)
        self._error: Exception | None = None

    def call(self, number: int, key: bytes) -> None:
        """Say which connection this is, and authenticate both ends."""
        with self._time_limit(_AUTHENTICATE):
            self._stream.send_bytes(_NUMBER.pack(number))
            mp.answer_challenge(self._stream, key)
            mp.deliver_challenge(self._stream, key)

    def answer(self, key_of: Callable[[int], bytes | None], seconds: float) -> int:
        """Hear which connection this is, and authenticate both ends; both within a time.

        Returns:
            Number of the connection.
        """
        with self._time_limit(seconds):
            (number,) = _NUMBER.unpack(self._stream.recv_bytes(_NUMBER.size).ljust(_NUMBER.size))
            key = key_of(number)
            if key is None:
                raise AuthenticationError("no such connection is expected")
            mp.deliver_challenge(self._stream, key)
            mp.answer_challenge(self._stream, key)
        return number

    def start(self, on_message: Callable[[Any], None], on_end: Callable[[Exception | None], None]) -> None:
        """Send and receive from now on; to be called once.

        Args:
            on_message: called with every message, on a thread of the connection.
            on_end: called once, when nothing more can come; with the error if it has ended for another reason than that
                the other end has closed it, or is gone.
        """
        self._sender.start()
        threading.Thread(
            target=self._receive, args=(on_message, on_end), name="connection-receive", daemon=True
        ).start()

    def send(self, message: object) -> None:
        """Have a message sent after those before it; it is lost if the connection has ended."""
        self._outbox.put((message,))

    def close(self, *, flush: float = 0.0) -> None:
        """End the connection.

        Args:
            flush: seconds to wait until all messages are on their way.
        """
        self._outbox.put(None)
        if self._sender.ident is not None:
            self._sender.join(flush)
        self._hang_up()

    def _send(self) -> None:
        try:
            while (entry := self._outbox.get()) is not None:
                text, arrays = encode(entry[0])
                self._stream.send_bytes(text)
                for array in arrays:
                    self._stream.send_bytes(array.reshape(-1).view("u1").data)
        except OSError:
            pass  # the other end is gone, which the other thread finds, too
        except Exception as error:  # noqa: BLE001 - whoever has started the connection reports it
            self._error = self._error or error
            self._hang_up()

    def _receive(self, on_message: Callable[[Any], None], on_end: Callable[[Exception | None], None]) -> None:
        try:
            while True:
                on_message(decode(self._stream.recv_bytes(), self._stream.recv_bytes))
        except (EOFError, OSError):
            pass  # the other end is gone
        except Exception as error:  # noqa: BLE001 - `on_end` reports it
            self._error = self._error or error
        finally:
            self._outbox.put(None)
            self._hang_up()
            on_end(self._error)

    def _hang_up(self) -> None:
        """Wake both threads, on both ends, whatever they wait for."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _time_limit(self, seconds: float) -> Iterator[None]:
        timer = threading.Timer(seconds, self._hang_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except BaseException:
            self._hang_up()
            raise
        finally:
            timer.cancel()


class Peer:
    """The controller's end to one rank, before, while and after it is connected. Nothing here waits.

    Args:
        news: set whenever there is something to take, or the connection has ended.
    """

    def __init__(self, news: threading.Event) -> None:
        self.gone = False
        """The connection has ended."""
        self.error: Exception | None = None
        """Why it has, if the rank is not to blame or has sent what is no message."""
        self._news = news
        self._connection: Connection | None = None
        self._inbox: deque[Any] = deque()
        self._closed = False

    @property
    def connected(self) -> bool:
        """The rank has connected."""
        return self._connection is not None

    def send(self, message: object) -> None:
        """Send a message, if the rank is connected."""
        if self._connection is not None:
            self._connection.send(message)

    def take(self) -> list[Any]:
        """Messages that have come since the last call."""
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def attach(self, connection: Connection) -> None:
        """The rank has connected."""
        self._connection = connection
        connection.start(self._receive, self._end)
        if self._closed:
            connection.close()

    def close(self) -> None:
        """Send and receive nothing more."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()

    def _receive(self, message: Any) -> None:
        self._inbox.append(message)
        self._news.set()

    def _end(self, error: Exception | None) -> None:
        self.error, self.gone = error, True
        self._news.set()


class Listener:
    """Takes the connections of ranks. Who connects and says nothing is dropped after a while, and holds up nobody.

    Args:
        host: address of this machine that ranks can reach.
        patience: seconds for who has connected to authenticate.
    """

    def __init__(self, host: str, *, patience: float = _AUTHENTICATE) -> None:
        self.news = threading.Event()
        """Set whenever a peer has something to take, or its connection has ended; who waits for it clears it."""
        self._host, self._patience, self._closed = host, patience, False
        self._expected: dict[int, tuple[bytes, Peer]] = {}
        self._numbers = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=256)
        self._port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._thread.start()

    def expect(self) -> tuple[Peer, Address]:
        """A peer that is not connected yet, and how it is to connect."""
        peer, key = Peer(self.news), secrets.token_bytes(_KEY_BYTES)
        self._numbers += 1
        self._expected[self._numbers] = key, peer
        return peer, Address(host=self._host, port=self._port, number=self._numbers, key=key)

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
                time.sleep(_PAUSE)

    def _admit(self, caller: socket.socket) -> None:
        connection = Connection(caller)
        try:
            number = connection.answer(self._key_of, self._patience)
        except _REFUSED:
            connection.close()
            return
        _, peer = self._expected.pop(number, (b"", None))
        if peer is None:
            connection.close()
        else:
            peer.attach(connection)

    def _key_of(self, number: int) -> bytes | None:
        key, _ = self._expected.get(number, (None, None))
        return key

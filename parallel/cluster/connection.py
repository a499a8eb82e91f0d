"""A line: messages between the driver and one rank, over a connection of their own.

Ray starts ranks and sees them die. What they say meanwhile does not go through it: a call of an actor keeps several
processes busy for a millisecond, and an actor that hears calls while it works wakes a hundred times a second for that.
"""

from __future__ import annotations

import pickle
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

_COUNT = struct.Struct("<I")
_CONNECT = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How a rank calls the driver."""

    host: str  # of the driver
    port: int  # where it listens
    key: bytes  # who calls; nobody else knows it


def dial(call: Call) -> Connection:
    """Call the driver.

    Raises:
        OSError: it cannot be reached.
    """
    connection = connection_of(socket.create_connection((call.host, call.port), timeout=_CONNECT))
    connection.send_bytes(call.key)
    return connection


def connection_of(own: socket.socket) -> Connection:
    """Take over a connected socket. Small messages leave at once."""
    own.settimeout(None)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(own.detach())


class Line:
    """One end of a line. Nobody waits for the other end: there is a thread for what comes and one for what goes.

    Args:
        connection: open.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outbox: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self._speaker = threading.Thread(target=self._speak, name="line-out", daemon=True)
        self._speaker.start()

    def listen(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """Hear from now on; to be called once.

        Args:
            on_message: called with whatever comes.
            on_end: called once, when nothing more can come.
        """
        threading.Thread(target=self._listen, args=(on_message, on_end), name="line-in", daemon=True).start()

    def send(self, message: Any) -> None:
        """Have a message sent after those before it; it is lost if the line has ended."""
        self._outbox.put((message,))

    def close(self, *, flush: float = 0.0) -> None:
        """End the line.

        Args:
            flush: seconds to wait until all messages are on their way.
        """
        self._outbox.put(None)
        self._speaker.join(flush)
        self._hang_up()

    def _listen(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        try:
            with suppress(EOFError, OSError):
                while True:
                    on_message(_read(self._connection))
        finally:
            self._outbox.put(None)
            self._hang_up()
            on_end()

    def _speak(self) -> None:
        try:
            with suppress(OSError):
                while (entry := self._outbox.get()) is not None:
                    _write(self._connection, entry[0])
        except BaseException:
            self._hang_up()  # such as a message that cannot be pickled: the other end must not wait for more
            raise

    def _hang_up(self) -> None:
        """Wake both threads, on both ends, whatever they wait for."""
        with suppress(OSError):
            own = socket.socket(fileno=self._connection.fileno())
            try:
                own.shutdown(socket.SHUT_RDWR)
            finally:
                own.detach()


def _write(connection: Connection, message: Any) -> None:
    """Send a message; arrays in it go as they lie in memory."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send_bytes(_COUNT.pack(len(buffers)) + head)
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _read(connection: Connection) -> Any:
    data = connection.recv_bytes()
    (count,) = _COUNT.unpack_from(data)
    return pickle.loads(memoryview(data)[_COUNT.size :], buffers=[connection.recv_bytes() for _ in range(count)])


_PAUSE = 0.1
_KEY_BYTES = 32


class Peer:
    """The driver's end to one rank, before, while and after it is there. Nothing here waits.

    Args:
        news: set whenever there is something to take, or the rank has hung up.
    """

    def __init__(self, news: threading.Event) -> None:
        self._news = news
        self._line: Line | None = None
        self._inbox: deque[Any] = deque()
        self._closed = self.gone = False
        """`gone`: the rank was here, and has hung up."""

    @property
    def here(self) -> bool:
        """The rank has called."""
        return self._line is not None

    def send(self, message: Any) -> None:
        """Tell the rank, if it is here."""
        if self._line is not None:
            self._line.send(message)

    def take(self) -> list[Any]:
        """What has come since the last call."""
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def connect(self, connection: Connection) -> None:
        """The rank has called."""
        self._line = Line(connection)
        self._line.listen(self._hear, self._end)
        if self._closed:
            self._line.close()

    def close(self) -> None:
        """Say and hear nothing more."""
        self._closed = True
        if self._line is not None:
            self._line.close()

    def _hear(self, message: Any) -> None:
        self._inbox.append(message)
        self._news.set()

    def _end(self) -> None:
        self.gone = True
        self._news.set()


class Exchange:
    """Listens for calls.

    Args:
        host: address of this machine that ranks can reach.

    Attributes:
        news: set whenever a peer has something to take, or has hung up; whoever waits for it clears it.
    """

    def __init__(self, host: str) -> None:
        self.news = threading.Event()
        self._host, self._over = host, False
        self._expected: dict[bytes, Peer] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=256)
        self._port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, name="exchange", daemon=True)
        self._thread.start()

    def expect(self) -> tuple[Peer, Call]:
        """A peer that is not here yet, and how it is to call."""
        peer, key = Peer(self.news), secrets.token_bytes(_KEY_BYTES)
        self._expected[key] = peer
        return peer, Call(host=self._host, port=self._port, key=key)

    def close(self) -> None:
        """Take no more calls; lines that are open stay."""
        self._over = True
        with suppress(OSError):
            socket.create_connection((self._host, self._port)).close()  # wakes the thread
        self._thread.join()
        self._listener.close()

    def _listen(self) -> None:
        while not self._over:
            try:
                caller, _ = self._listener.accept()
            except OSError:  # such as too many open files, which may pass
                time.sleep(_PAUSE)
                continue
            # Somebody who connects and says nothing holds up nobody else.
            threading.Thread(target=self._put_through, args=(caller,), name="caller", daemon=True).start()

    def _put_through(self, caller: socket.socket) -> None:
        connection = connection_of(caller)
        with suppress(EOFError, OSError):
            peer = self._expected.pop(connection.recv_bytes(_KEY_BYTES), None)
            if peer is not None:
                peer.connect(connection)
                return
        connection.close()

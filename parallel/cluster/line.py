"""A line: messages between the driver and one rank, over a connection of their own.

Ray starts ranks and sees them die. What they say meanwhile does not go through it: a call of an actor keeps several
processes busy for a millisecond, and an actor that hears calls while it works wakes a hundred times a second for that.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

__all__ = ["Call", "Line", "connection_of", "dial"]

_COUNT = struct.Struct("<I")
_CONNECT = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How a rank calls the driver.

    Attributes:
        host: of the driver.
        port: where it listens.
        key: who calls; nobody else knows it.
    """

    host: str
    port: int
    key: bytes


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

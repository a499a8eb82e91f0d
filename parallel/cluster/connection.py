"""Connections between the controller and ranks: messages over TCP, one connection for each rank.

The gang's listener (`parallel/comm/store.py`) takes them where it takes those to the store, from ranks alone that know
the gang's secret, which goes to them through Ray. Messages are plain data (`messages.py`), so a message runs no code.

Ray starts ranks and sees them die. Messages do not go through it: a call of an actor keeps several processes busy for a
millisecond, and an actor that takes calls while it works wakes a hundred times a second for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from parallel.cluster.messages import decode, encode
from parallel.comm.sockets import Address, Stream, dial
from parallel.health.timeouts import CONNECT_SECONDS

OnMessage = Callable[[Any], None]
OnEnd = Callable[[Exception | None], None]


def connect(address: Address, rank: int, on_message: OnMessage, on_end: OnEnd) -> Connection:
    """Connect a rank to the controller, with functions for `Connection`; an OSError if it cannot be reached."""
    connection = Connection(on_message, on_end)
    connection.open(dial(address, rank, CONNECT_SECONDS))
    return connection


class Connection:
    """One end of a connection. Nobody waits for the other end: one thread sends and another one receives.

    `on_message` is called with every message, on a thread of the connection; `on_end` once, when nothing more can come,
    with the error if the connection has ended for another reason than that the other end has closed it, or is gone.
    """

    def __init__(self, on_message: OnMessage, on_end: OnEnd) -> None:
        self._on_message, self._on_end = on_message, on_end
        self.closed = False
        self._error: Exception | None = None
        self._outbox: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self._stream: Stream | None = None
        self._sender: threading.Thread | None = None

    def open(self, stream: Stream) -> None:
        """Send and receive from now on, through a stream; a second one is ended."""
        if self._stream is not None:
            return stream.end()
        self._stream = stream
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
        if self._stream is not None:
            self._stream.end()

    def _send(self, stream: Stream) -> None:
        try:
            while (entry := self._outbox.get()) is not None:
                text, arrays = encode(entry[0])
                stream.send(text)
                for array in arrays:
                    stream.send(array.reshape(-1).view("u1").data)
        except OSError:
            pass  # the other end is gone, which the other thread finds, too
        except Exception as error:  # noqa: BLE001 - `on_end` reports it
            self._error = self._error or error
            stream.end()

    def _receive(self, stream: Stream) -> None:
        try:
            while True:
                self._on_message(decode(stream.receive(), stream.receive))
        except (EOFError, OSError):
            pass  # the other end is gone
        except Exception as error:  # noqa: BLE001 - `on_end` reports it
            self._error = self._error or error
        finally:
            self._outbox.put(None)
            stream.end()
            self._on_end(self._error)

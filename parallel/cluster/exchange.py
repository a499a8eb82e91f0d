"""Where the ranks of all gangs call the driver, and are put through to whoever expects them."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from parallel.cluster.line import Call, Line, connection_of

__all__ = ["Exchange", "Peer"]

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

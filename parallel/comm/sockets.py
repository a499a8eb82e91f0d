"""Sockets between the processes of a run: both ends prove that they know its secret before they read anything else.

The proof is the challenge of `multiprocessing.connection`: the secret itself never goes over the wire. What is sent
after that is plain bytes in blocks, and not encrypted. Nothing here is unpickled.
"""

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp

from models.errors import InputError
from parallel.health.timeouts import ACCEPT_AGAIN_SECONDS, AUTHENTICATE_SECONDS

_PURPOSE = struct.Struct("<q")
_NOT_ONE_OF_US = EOFError, OSError, AuthenticationError, AssertionError, struct.error
_ADDRESS_OF = 0x8915  # Linux' SIOCGIFADDR


class NotAuthenticated(ConnectionError):  # noqa: N818 - reads as what it says
    """The other end does not know the secret, or not this way of proving it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a listener is."""

    host: str
    port: int
    secret: str = field(repr=False)  # that both ends must know


class Stream:
    """An authenticated connection. One thread may send while another one receives."""

    def __init__(self, own: socket.socket) -> None:
        own.settimeout(None)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small messages leave at once
        self.socket = own
        blocks = mp.Connection(os.dup(own.fileno()))
        self.send, self.receive = blocks.send_bytes, blocks.recv_bytes
        self._blocks = blocks

    def prove(self, secret: str, *, first: bool) -> None:
        """Show the other end that this one knows the secret, and have it do the same; one of the two is `first`."""
        for challenges in (first, not first):
            (mp.deliver_challenge if challenges else mp.answer_challenge)(self._blocks, secret.encode())

    def end(self) -> None:
        """All threads that wait for it, on both ends, go on with an EOFError or OSError."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def dial(address: Address, purpose: int, timeout: float) -> Stream:
    """Connect to a listener and say what for; an OSError if it cannot be reached."""
    stream = Stream(socket.create_connection((address.host, address.port), timeout=timeout))
    try:
        with _time_limit(stream, AUTHENTICATE_SECONDS):
            stream.prove(address.secret, first=False)
            stream.send(_PURPOSE.pack(purpose))
    except _NOT_ONE_OF_US:
        stream.end()
        raise NotAuthenticated("it does not know this run's secret") from None
    return stream


class Listener:
    """Takes connections at one address of this machine; each that has authenticated is `opened`, in its own thread.

    A caller that has not authenticated after `patience` seconds is dropped, and holds up no other one. `opened` is
    given what the connection is for.
    """

    def __init__(
        self,
        host: str,
        secret: str,
        opened: Callable[[int, Stream], None],
        *,
        port: int = 0,
        patience: float = AUTHENTICATE_SECONDS,
    ) -> None:
        self._opened, self._patience, self._closed = opened, patience, False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=1024)
        self.address = Address(host=host, port=self._socket.getsockname()[1], secret=secret)
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections; those that are open stay."""
        self._closed = True
        with suppress(OSError):  # wakes the thread
            socket.create_connection(self._socket.getsockname()[:2]).close()
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
        with suppress(*_NOT_ONE_OF_US):
            stream = Stream(caller)
            with _time_limit(stream, self._patience):
                stream.prove(self.address.secret, first=True)
                (purpose,) = _PURPOSE.unpack(stream.receive(_PURPOSE.size))
            return self._opened(purpose, stream)
        with suppress(OSError):
            caller.shutdown(socket.SHUT_RDWR)
        caller.close()


@contextmanager
def _time_limit(stream: Stream, seconds: float) -> Iterator[None]:
    """End a connection if what is done within takes longer."""
    timer = threading.Timer(seconds, stream.end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def interface_address(interface: str) -> str:
    """The IPv4 address of a network interface; an InputError if there is no such interface, or it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    names = ", ".join(name for _, name in socket.if_nameindex())
    raise InputError(f"--interface {interface} has no IPv4 address on this machine, which has {names}")


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None if none has."""
    for _, name in socket.if_nameindex():
        with suppress(InputError):
            if interface_address(name) == address:
                return name
    return None

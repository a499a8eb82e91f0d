"""Slow readers of a video that is made: do they slow it down? Pairs of videos, one with readers and one without."""

import socket
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from random import Random

from benchmarks.common import Row, Verdict
from benchmarks.service.client import Service

_BYTES, _PAUSE = 512, 0.5  # that a slow reader takes, and seconds until it takes some more
_BUFFER = 4096  # bytes that the system may keep for it, about
_MOST = 0.05  # that readers may slow the making by


@dataclass(frozen=True, kw_only=True, slots=True)
class Readers:
    """Seconds that each video took, in pairs."""

    readers: int  # of a stream
    pairs: Sequence[tuple[float, float]]  # without and with readers

    @property
    def verdicts(self) -> list[Verdict]:
        """What they are held to: by how much readers slow down, the median of pairs made one after the other."""
        slower = statistics.median(with_readers / without for without, with_readers in self.pairs) - 1
        name = f"{self.readers} slow readers, median of {len(self.pairs)} pairs"
        return [Verdict(name, f"{slower:+.1%}", f"at most +{_MOST:.0%}", slower <= _MOST)]

    @property
    def rows(self) -> list[Row]:
        """A line for each pair."""
        return [
            {"pair": number, "without_s": without, "with_s": with_readers, "ratio": with_readers / without}
            for number, (without, with_readers) in enumerate(self.pairs, 1)
        ]


def run_readers(service: Service, readers: int, rounds: int, seconds: int, seed: int) -> Readers:
    """Make pairs of videos of so many `seconds`, in an order that is drawn, one video at a time."""
    draw, pairs = Random(seed), []
    _make(service, 0, seconds)  # the first one is not counted
    for _ in range(rounds):
        took = {}
        for count in draw.sample((0, readers), 2):
            took[count > 0] = _make(service, count, seconds)
        pairs.append((took[False], took[True]))
    return Readers(readers=readers, pairs=pairs)


def _make(service: Service, readers: int, seconds: int) -> float:
    """Make a video with so many readers; the seconds that it took a gang."""
    name = service.create(seconds=seconds)
    with ExitStack() as stack:
        for _ in range(readers):
            stack.enter_context(_reader(service, name))
        service.ended(name)
    job = service.job(name)
    return float(job["completed_at"] - job["began_at"])


@contextmanager
def _reader(service: Service, name: str) -> Iterator[None]:
    """Read a stream slowly on a thread, until the end of the context."""
    over = threading.Event()
    host, _, port = service.address.partition(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        connection.connect((host, int(port)))
        connection.sendall(f"GET /v1/videos/{name}/stream HTTP/1.1\r\nHost: {service.address}\r\n\r\n".encode())

        def read() -> None:
            with suppress(OSError):
                while not over.wait(_PAUSE) and connection.recv(_BYTES):
                    pass

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

"""Somebody who reaches the ports of a run and does not belong to it: what he finds, sends and gets."""

import os
import random
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

from parallel.health.processes import descendants

_TORCH_MAGIC = struct.pack("<BI", 0, 0x3C85F7CE)  # how a client of PyTorch's store begins


def _torch_set(key, value):
    return b"\x01" + b"".join(struct.pack("<Q", len(text)) + text for text in (key, value))


def garbage():
    """What no process of ours sends: random bytes, half headers, huge lengths, and protocols of others."""
    made = random.Random(7)
    failure = b'{"message": "I was here", "reporter": 0, "status": 1, "hung": []}'
    yield from (made.randbytes(size) for size in (1, 3, 8, 64, 4096, 100_000))
    yield from (b"\0" * 3, b"FLC2" + b"\0" * 2044, b"FLC2\x01")
    for length in (-1, 0, 1, 2**31 - 1, 2**30):
        yield struct.pack("!i", length) + b"#CHALLENGE#" + b"x" * 100
    yield struct.pack("!iQ", -1, 2**63) + b"x" * 100
    yield struct.pack("<QQQ", 2**63, 1, 1)
    yield _TORCH_MAGIC + _torch_set(b"flowcache/0/failure", failure)
    yield _TORCH_MAGIC + b"\x01" + struct.pack("<Q", 2**62)
    yield b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    yield b"\x80\x04\x95" + made.randbytes(60)  # the beginning of a pickle


def listening(pids):
    """The addresses (host, port) that processes listen at, as IPv4; every address is 0.0.0.0."""
    own = set()
    for pid in pids:
        with suppress(OSError):
            for handle in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    own.add(os.readlink(f"/proc/{pid}/fd/{handle}").removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                address, _, port = fields[1].partition(":")
                found.add((socket.inet_ntoa(bytes.fromhex(address[-8:])[::-1]), int(port, 16)))
    return found


def own_address():
    """An address of this machine that others reach it at, if there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]


def reaches(host, port):
    """Whether something listens there."""
    with suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


def told(port, sent, source="127.0.0.2"):
    """What comes back from a port of the loopback address within a moment, for what is sent from another address."""
    answer = b""
    with suppress(OSError):
        with socket.create_connection(("127.0.0.1", port), timeout=2, source_address=(source, 0)) as caller:
            caller.settimeout(0.2)
            caller.sendall(sent)
            while (more := caller.recv(4096)) and len(answer) < 1 << 16:
                answer += more
    return answer


class Fuzzer:
    """Sends garbage to every port that a process and its children have open, over and over, until it is stopped.

    A part of its connections stays open, as those of somebody who says nothing more. `seen` are the addresses of all
    these processes; those that `spares` a process does not bother.
    """

    def __init__(self, pid, spares=lambda pid: False):
        self.seen, self.ports, self._pid, self._spares, self._held = set(), set(), pid, spares, []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stopped.wait(0.3):
            pids = {self._pid, *descendants(self._pid)}
            self.seen |= listening(pids)
            for _, port in listening(pid for pid in pids if not self._spares(pid)):
                for sent in garbage():
                    with suppress(OSError):
                        self._bother(port, sent)

    def _bother(self, port, sent):
        caller = socket.create_connection(("127.0.0.1", port), timeout=1)
        self._held.append(caller)
        caller.sendall(sent)
        self.ports.add(port)
        if len(self._held) > 40:
            self._held.pop(0).close()

    def stop(self):
        """Go away; gives the hosts of all addresses, the loopback address alone if all is well."""
        self._stopped.set()
        self._thread.join()
        for caller in self._held:
            caller.close()
        return {host for host, _ in self.seen}

"""The store where the ranks of a gang meet, and where it is: small values by name, in the memory of who serves it.

PyTorch's own store lets in whoever reaches it; this one only who knows the gang's secret (`sockets.py`). PyTorch uses
it as any other, to connect gloo and NCCL. A request is a block of JSON, and so is its answer.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from models.errors import InputError
from parallel.comm.sockets import Address, Listener, NotAuthenticated, Stream, dial, interface_address
from parallel.health.timeouts import POLL_SECONDS, STORE_SECONDS
from parallel.ranks.environment import RankEnv

PURPOSE = -1  # of a connection to the store
_BYTES = "latin-1"  # how bytes stand in JSON
_LOCAL, _ALL = "127.0.0.1", ""


class StoreError(RuntimeError):
    """The store has closed the connection, or what was waited for did not come."""


class Values:
    """The values, in the process that serves them. Text, as requests and answers are JSON; any thread may ask."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def answer(self, name: str, *arguments: Any) -> Any:
        """The answer to a request, one of `RunStore`'s; None if a value did not come in time."""
        with self._changed:
            values = self._values
            match name, arguments:
                case "set", (key, text):
                    values[key] = text
                case "compare_set", (key, expected, text):
                    if values.get(key, "") == expected:
                        values[key] = text
                case "add", (key, amount):
                    values[key] = str(int(values.get(key, 0)) + amount)
                case "delete_key", (key,):
                    return values.pop(key, None) is not None
                case "check", (keys,):
                    return all(key in values for key in keys)
                case "multi_get", (keys, seconds):
                    come = self._changed.wait_for(lambda: all(key in values for key in keys), seconds)
                    return [values[key] for key in keys] if come else None
                case _:
                    raise ValueError(f"a store has no {name}")
            self._changed.notify_all()
            return values.get(key, "")


class RunStore(dist.Store):
    """A store of PyTorch's over the values, which it asks here or over a connection.

    Whoever gives it to PyTorch has to keep it. `seconds` are how long `get` and `wait` wait; a StoreError after that.
    """

    def __init__(self, ask: Callable[..., Any], seconds: float) -> None:
        super().__init__()
        self._ask, self._seconds = ask, seconds

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value."""
        self._ask("set", key, _text(value))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a value if it is as expected, with nothing for none; gives the value that holds after that."""
        return _bytes(self._ask("compare_set", key, _text(expected), _text(desired)))

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first; gives the sum."""
        return int(self._ask("add", key, amount))

    def delete_key(self, key: str) -> bool:
        """Delete a value; whether there was one."""
        return bool(self._ask("delete_key", key))

    def check(self, keys: list[str]) -> bool:
        """Whether all values are there."""
        return bool(self._ask("check", keys))

    def multi_get(self, keys: list[str], seconds: float | None = None) -> list[bytes]:
        """Values, once all are there."""
        seconds = self._seconds if seconds is None else seconds
        found = self._ask("multi_get", keys, seconds)
        if found is None:
            raise StoreError(f"{', '.join(key for key in keys if not self.check([key]))}: not come in {seconds:.0f} s")
        return [_bytes(text) for text in found]

    def get(self, key: str) -> bytes:
        """A value, once it is there."""
        return self.multi_get([key])[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all values are there."""
        self.multi_get(keys, None if timeout is None else timeout.total_seconds())

    def set_timeout(self, timeout: timedelta) -> None:
        """How long to wait from now on."""
        self._seconds = timeout.total_seconds()

    @property
    def timeout(self) -> timedelta:
        """How long it waits."""
        return timedelta(seconds=self._seconds)

    def clone(self) -> RunStore:
        """Another one like it; PyTorch's threads may want one of their own."""
        return RunStore(self._ask, self._seconds)

    def has_extended_api(self) -> bool:
        """PyTorch must not ask for more than this."""
        return False


class StoreServer:
    """Serves values to whoever knows the secret. Other connections to the same port go to `opened`."""

    def __init__(
        self,
        host: str,
        secret: str | None = None,  # None makes one
        *,
        port: int = 0,  # 0 for a free one
        opened: Callable[[int, Stream], None] | None = None,
    ) -> None:
        self._values, self._opened, self._streams = Values(), opened, set[Stream]()
        self._closed, self._lock = False, threading.Lock()
        self.store = RunStore(self._values.answer, 0.0)  # for this process
        secret = secrets.token_hex(32) if secret is None else secret
        self._listener = Listener(host, secret, self._serve, port=port)
        self.address = self._listener.address

    def close(self) -> None:
        """Serve no more: connections to the store end."""
        self._listener.close()
        with self._lock:  # a connection may have been made and not be known yet
            self._closed = True
            for stream in self._streams:
                stream.end()

    def _serve(self, purpose: int, stream: Stream) -> None:
        if purpose != PURPOSE:
            return stream.end() if self._opened is None else self._opened(purpose, stream)
        with self._lock:
            self._streams.add(stream)
        try:
            while not self._closed:
                stream.send(_packed(self._values.answer(*json.loads(stream.receive()))))
        except (EOFError, OSError, ValueError, TypeError):
            pass  # the other end is gone, or is of another version
        finally:
            with self._lock:
                self._streams.remove(stream)
            stream.end()


def connect_store(address: Address, *, patience: float, timeout: float) -> RunStore:
    """A connection of its own to a store; a StoreError if that is not there within `patience` seconds.

    Who uses one waits for others that do so. `get` and `wait` wait `timeout` seconds for a value.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            stream = dial(address, PURPOSE, max(POLL_SECONDS, deadline - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, NotAuthenticated):
                raise StoreError(error.strerror or str(error)) from None
            time.sleep(POLL_SECONDS)
    lock = threading.Lock()

    def ask(*request: Any) -> Any:
        try:
            with lock:
                stream.send(_packed(request))
                return json.loads(stream.receive())
        except (EOFError, OSError) as error:
            raise StoreError(f"the store has closed its connections: {error}") from None

    return RunStore(ask, timeout)


def _packed(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _text(value: str | bytes) -> str:
    return (value.encode() if isinstance(value, str) else bytes(value)).decode(_BYTES)


def _bytes(text: str) -> bytes:
    return text.encode(_BYTES)


# ---- where it is


def meet(env: RankEnv, interface: str | None, timeout: float) -> tuple[StoreServer | None, Address]:
    """Where the ranks' store is, and its server if it is this rank that serves it.

    An InputError if ranks of several machines have no secret; a RuntimeError if torchrun's store does not answer.
    """
    secret = env.secret
    if not secret and not env.one_machine:
        raise InputError(
            "ranks on several machines need the same FLOWCACHE_SECRET, any text, in the environment of each"
        )
    at = Address(host=env.host, port=env.port, secret=secret)
    if env.launcher_serves or (env.rank and not env.torchrun):
        return None, at
    server = None
    if env.rank == 0:
        own = _LOCAL if env.one_machine else _ALL if interface is None else interface_address(interface)
        server = StoreServer(own, secret, port=0 if env.torchrun else env.port)
    if not env.torchrun:
        return server, at
    # Torchrun's store lets in everybody, so who has written the address is checked.
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore(env.host, env.port, is_master=False, wait_for_workers=False, timeout=limit)
    key = f"flowcache/{env.attempt}/store"
    if server is not None:
        text = json.dumps([own or _seen_from(env.host), server.address.port])
        store.set(key, json.dumps([text, _proof(secret, key, text)]))
    text, proof = json.loads(store.get(key))
    if not hmac.compare_digest(proof, _proof(secret, key, text)):
        raise InputError("the address of rank 0 in torchrun's store was not written with this FLOWCACHE_SECRET")
    host, port = json.loads(text)
    return server, Address(host=host, port=port, secret=secret)


def connect(env: RankEnv, address: Address, timeout: float) -> RunStore:
    """A connection to the ranks' store; a StoreError if it is not there."""
    patience = min(timeout, STORE_SECONDS) if env.launcher_serves else timeout
    return connect_store(address, patience=patience, timeout=timeout)


def _proof(secret: str, key: str, text: str) -> str:
    return hmac.digest(secret.encode(), f"{key} {text}".encode(), "sha256").hex()


def _seen_from(host: str) -> str:
    """This machine's address on the way to another one, or that one's name if it is this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        own = str(probe.getsockname()[0])
    return host if own.startswith("127.") else own

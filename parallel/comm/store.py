"""The store where the ranks of a gang meet: small values by name, in the memory of the process that serves it.

PyTorch's own store lets in whoever reaches it; this one only who knows the gang's secret (`sockets.py`). PyTorch uses
it as any other, to connect gloo and NCCL. A request is a block of JSON, and so is its answer.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from parallel.comm.sockets import Address, Listener, NotAuthenticated, Stream, dial
from parallel.health.timeouts import POLL_SECONDS

PURPOSE = -1  # of a connection to the store
_BYTES = "latin-1"  # how bytes stand in JSON


class StoreError(RuntimeError):
    """The store has closed the connection, or what was waited for did not come."""


class Values(Store):
    """The values, for the process that serves them; any thread may use them. Nothing is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value."""
        with self._changed:
            self._values[key] = _encoded(value)
            self._changed.notify_all()

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a value if it is as expected, with nothing for none; gives the value that holds after that."""
        with self._changed:
            if self._values.get(key, b"") == _encoded(expected):
                self.set(key, desired)
            return self._values.get(key, b"")

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first; gives the sum."""
        with self._changed:
            total = int(self._values.get(key, b"0")) + amount
            self.set(key, str(total))
            return total

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all values are there."""
        return all(key in self._values for key in keys)

    def multi_get(self, keys: Sequence[str], seconds: float = 0.0) -> list[bytes]:
        """Values, which are waited for so long; a StoreError if they do not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.check(keys), seconds):
                missing = [key for key in keys if key not in self._values]
                raise StoreError(f"{missing[0]} has not come within {seconds:.0f} s")
            return [self._values[key] for key in keys]

    def get(self, key: str) -> bytes:
        """A value; a StoreError if it is not there."""
        return self.multi_get([key])[0]

    def delete_key(self, key: str) -> bool:
        """Delete a value; whether there was one."""
        with self._changed:
            return self._values.pop(key, None) is not None


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
        secret = secrets.token_hex(32) if secret is None else secret
        self.values, self._opened, self._streams = Values(), opened, list[Stream]()
        self._listener = Listener(host, secret, self._serve, port=port)
        self.address = self._listener.address

    def close(self) -> None:
        """Serve no more: connections to the store end."""
        self._listener.close()
        for stream in self._streams:
            stream.end()

    def _serve(self, purpose: int, stream: Stream) -> None:
        if purpose != PURPOSE:
            return stream.end() if self._opened is None else self._opened(purpose, stream)
        self._streams.append(stream)
        try:
            while True:
                name, *arguments = json.loads(stream.receive())
                stream.send(json.dumps(self._answer(name, arguments)).encode())
        except (EOFError, OSError, ValueError, TypeError):
            pass  # the other end is gone, or is of another version
        finally:
            self._streams.remove(stream)
            stream.end()

    def _answer(self, name: str, arguments: list[Any]) -> Any:
        values = self.values
        match name:
            case "set":
                return values.set(arguments[0], arguments[1].encode(_BYTES))
            case "compare_set":
                key, *texts = arguments
                return values.compare_set(key, *(text.encode(_BYTES) for text in texts)).decode(_BYTES)
            case "multi_get":
                try:
                    return [value.decode(_BYTES) for value in values.multi_get(*arguments)]
                except StoreError as error:
                    return str(error)
            case "add" | "check" | "delete_key":
                return getattr(values, name)(*arguments)
        raise ValueError(f"a store has no {name}")


class StoreClient(Store):
    """A connection to a store, as a store of PyTorch's. A thread that uses one waits for others that do so."""

    def __init__(self, address: Address, *, patience: float, timeout: float) -> None:
        """Connect.

        Args:
            address: of the store.
            patience: seconds to wait for it to be there; a StoreError if it is not.
            timeout: seconds that `get` and `wait` wait for a value.
        """
        super().__init__()
        self._address, self._seconds, self._lock = address, timeout, threading.Lock()
        deadline = time.monotonic() + patience
        while True:
            try:
                self._stream = dial(address, PURPOSE, max(POLL_SECONDS, deadline - time.monotonic()))
                return
            except OSError as error:
                if time.monotonic() > deadline or isinstance(error, NotAuthenticated):
                    raise StoreError(error.strerror or str(error)) from None
                time.sleep(POLL_SECONDS)

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value."""
        self._ask("set", key, _encoded(value).decode(_BYTES))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a value if it is as expected, with nothing for none; gives the value that holds after that."""
        texts = [_encoded(value).decode(_BYTES) for value in (expected, desired)]
        return str(self._ask("compare_set", key, *texts)).encode(_BYTES)

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first; gives the sum."""
        return int(self._ask("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        """Whether all values are there."""
        return bool(self._ask("check", keys))

    def multi_get(self, keys: list[str], seconds: float | None = None) -> list[bytes]:
        """Values, which are waited for; a StoreError if they do not come."""
        found = self._ask("multi_get", keys, self._seconds if seconds is None else seconds)
        if isinstance(found, str):
            raise StoreError(found)
        return [text.encode(_BYTES) for text in found]

    def get(self, key: str) -> bytes:
        """A value, which is waited for; a StoreError if it does not come."""
        return self.multi_get([key])[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for values; a StoreError if they do not come."""
        self.multi_get(keys, None if timeout is None else timeout.total_seconds())

    def delete_key(self, key: str) -> bool:
        """Delete a value; whether there was one."""
        return bool(self._ask("delete_key", key))

    def set_timeout(self, timeout: timedelta) -> None:
        """How long to wait for a value from now on."""
        self._seconds = timeout.total_seconds()

    @property
    def timeout(self) -> timedelta:
        """How long a value is waited for."""
        return timedelta(seconds=self._seconds)

    def clone(self) -> StoreClient:
        """Another connection to the same store."""
        return StoreClient(self._address, patience=self._seconds, timeout=self._seconds)

    def has_extended_api(self) -> bool:
        """PyTorch must not ask for more than this."""
        return False

    def _ask(self, *request: Any) -> Any:
        try:
            with self._lock:
                self._stream.send(json.dumps(request).encode())
                return json.loads(self._stream.receive())
        except (EOFError, OSError) as error:
            raise StoreError(f"the store has closed its connections: {error}") from None


def _encoded(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)

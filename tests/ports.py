"""Ports for processes that are told theirs before they bind it."""

import secrets
import socket
from contextlib import suppress

_FIRST, _LAST = 20_000, 32_000  # the kernel hands out later ones, Ray's workers take earlier ones


def free_ports(count):
    """Ports that nobody listens on, and that other tests which run at the same time are not given by chance."""
    found = set()
    while len(found) < count:
        port = _FIRST + secrets.randbelow(_LAST - _FIRST)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.add(port)
    return list(found)

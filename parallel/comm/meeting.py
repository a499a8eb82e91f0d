"""Where the ranks of a gang meet: the address of their store, and the network interface that they listen at."""

import fcntl
import hmac
import json
import socket
import struct
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from models.errors import InputError
from parallel.comm.sockets import Address
from parallel.comm.store import RunStore, StoreServer, connect_store
from parallel.health.timeouts import STORE_SECONDS
from parallel.ranks.environment import RankEnv

_LOCAL, _ALL = "127.0.0.1", ""
_ADDRESS_OF = 0x8915  # Linux' SIOCGIFADDR


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

"""Which rank a process is, from the variables that torchrun or another launcher sets.

This is the only module that reads or changes the environment. The variables are those of torchrun, so that every
launcher that sets them starts the same ranks. No torch in here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import InputError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SECRET = "FLOWCACHE_SECRET"
_SERVES, _SPEAKS = "FLOWCACHE_LAUNCHER_SERVES", "FLOWCACHE_LAUNCHER_SPEAKS"
_LAUNCHED = "FLOWCACHE_LAUNCHED"
_LOOPBACK = "127.0.0.1", "::1", "localhost"


def prompt_cache() -> Path:
    """Where encoded prompts are kept unless another folder is named, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowcache" / "prompts"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnv:
    """Which rank this process is, and where the ranks meet."""

    rank: int  # among all
    world_size: int  # how many there are
    local_rank: int  # among those of this machine
    host: str  # of the store where ranks meet
    port: int  # of that store
    secret: str = field(default="", repr=False)  # that all ranks know, and nobody else
    one_machine: bool = False  # all ranks are on this machine
    torchrun: bool = False  # the store is torchrun's, and says no more than where rank 0 serves the ranks' own
    launcher_serves: bool = False  # the launcher serves the store; otherwise rank 0 does
    launcher_speaks: bool = False  # the launcher shows what went wrong, so the ranks stay silent
    launched: bool = False
    """This process was started for its rank alone, by a launcher that is its parent, and ends with it."""
    attempt: int = 0  # how often the launcher has started all ranks again

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> RankEnv | None:
        """The rank that the variables describe, None if this process is alone; an InputError if one cannot be read."""
        found = os.environ if environment is None else environment
        if "RANK" not in found and "WORLD_SIZE" not in found:
            return None
        if missing := [name for name in _NEEDED if name not in found]:
            raise InputError(f"the environment lacks {', '.join(missing)}: start ranks with torchrun")
        host, world_size = found["MASTER_ADDR"], _number(found, "WORLD_SIZE")
        return cls(
            rank=_number(found, "RANK"),
            world_size=world_size,
            local_rank=_number(found, "LOCAL_RANK"),
            host=host,
            port=_number(found, "MASTER_PORT"),
            secret=found.get(_SECRET, ""),
            one_machine=host in _LOOPBACK or found.get("LOCAL_WORLD_SIZE") == str(world_size),
            torchrun=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            launcher_serves=found.get(_SERVES) == "1",
            launcher_speaks=found.get(_SPEAKS) == "1",
            launched=found.get(_LAUNCHED, "1" if "TORCHELASTIC_RUN_ID" in found else "0") == "1",
            attempt=_number(found, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in found else 0,
        )

    def variables(self) -> dict[str, str]:
        """The variables that describe this rank."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
            "LOCAL_WORLD_SIZE": str(self.world_size if self.one_machine else 1),
            "TORCHELASTIC_USE_AGENT_STORE": str(self.torchrun),
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
            _SECRET: self.secret,
            _SERVES: "1" if self.launcher_serves else "0",
            _SPEAKS: "1" if self.launcher_speaks else "0",
            _LAUNCHED: "1" if self.launched else "0",
        }


def settle_libraries() -> None:
    """Set what libraries read when they are loaded, here and in processes that are started; what the user set stays.

    OpenMP's threads wait for each other without computing: where other processes want the cores, those that wait
    would take them from those that are waited for. Ray leaves signals to us. A Ray that is started here listens at the
    loopback address alone: it does so where it cannot form clusters, and has no other way to ask for it.
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")


def child_environment(env: RankEnv, *, threads: int) -> dict[str, str]:
    """The environment of a process that is started for an env: this one's, with the env and a number of threads."""
    return {**os.environ, **env.variables(), "OMP_NUM_THREADS": str(threads)}


@contextmanager
def listening_at(interface: str | None) -> Iterator[None]:
    """Have gloo and NCCL listen at a network interface, in a context. Variables alone tell them; what the user has set
    stays, and nothing is left to processes that are started later."""
    names = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
    added = {} if interface is None else {name: interface for name in names if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _number(found: Mapping[str, str], name: str) -> int:
    try:
        return int(found[name])
    except ValueError:
        raise InputError(f"the environment's {name} is {found[name]!r}, not a number") from None

"""Ranks of which one does something bad."""

import os
import signal
import time
from pathlib import Path

from engine import executor
from engine.reuse.flags import FlagLog
from models.errors import InputError
from tests.parallel.scenarios.videos import videos
from tests.parallel.small import Wrapped


class Trap(Wrapped):
    """A model that does something bad in its n-th call."""

    def __init__(self, model, calls, action):
        super().__init__(model)
        self._left, self._action = calls, action

    def layers(self, *arguments, **named):
        self._left -= 1
        if not self._left:
            self._action()
        return self._inner.layers(*arguments, **named)


def _raise():
    raise ValueError("a matrix of sorrows")


ACTIONS = {
    "raise": _raise,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sleep": lambda: time.sleep(600),
}


def trouble(gang, values, out):
    """As `videos`, but one rank does something bad after some calls."""
    Path(f"{out}.{gang.mesh.rank}").write_text(str(os.getpid()))
    told = [Path(f"{out}.{rank}") for rank in range(gang.mesh.layout.world_size)]
    while not all(
        path.exists() and path.stat().st_size for path in told
    ):  # before one fails all have said who they are
        time.sleep(0.01)
    if gang.mesh.rank != values["rank"]:
        videos(gang, values, out)
        return
    if values["action"] == "flip":
        executor.FlagLog = _Flipping
        videos(gang, values, out)
        return
    if values["action"] == "input":
        raise InputError("the weights have gone for a walk")
    action = ACTIONS[values["action"]]
    videos(gang, values, out, wrap=lambda model: Trap(model, values.get("calls", 20), action))


class _Flipping(FlagLog):
    """Reads one flag the wrong way round."""

    def add(self, flags):
        flags = list(flags)
        if flags and self.count <= 10 < self.count + len(flags):
            flags[10 - self.count] ^= 1
        super().add(flags)

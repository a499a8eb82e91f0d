"""How the ranks of a gang learn that one has failed: the first report wins, and everybody stops with its message.

The board is a key of the rendezvous store, so it outlives the rank that wrote it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torch.distributed import Store

FAILED, BAD_INPUT, STOPPED = 1, 2, 130
_KEY = "failure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a gang has stopped."""

    message: str  # one line that names the culprit
    status: int  # exit status of all ranks: 1, 2 for bad input, 130 for Ctrl-C
    reporter: int  # the rank that is to show it
    hung: tuple[int, ...] = ()  # ranks that cannot hear of it; whoever shares a machine with them ends them


class GangError(Exception):
    """The gang has failed; its text is the one line of `failure`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure

    def __reduce__(self) -> tuple[type[GangError], tuple[Failure]]:
        return GangError, (self.failure,)  # the text alone would not make it again in another process


class ErrorStore:
    """Where failures are reported and read."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def report(self, failure: Failure) -> Failure:
        """Report a failure.

        Returns:
            The one that was reported first.
        """
        return _read(self._store.compare_set(_KEY, "", json.dumps(asdict(failure))))

    def read(self) -> Failure | None:
        """What was reported, if anything."""
        return _read(self._store.get(_KEY)) if self._store.check([_KEY]) else None


def _read(raw: bytes) -> Failure:
    found = json.loads(raw)
    return Failure(
        message=found["message"], status=found["status"], reporter=found["reporter"], hung=tuple(found["hung"])
    )

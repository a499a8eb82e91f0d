"""How the ranks of a gang learn that one of them has failed: the first report wins and ends all ranks.

Reports live in the rendezvous store, so they outlive the rank that wrote them. No torch in here: the command line
imports this at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from parallel.health.exit_codes import FAILED

if TYPE_CHECKING:
    from torch.distributed import Store

_KEY = "failure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a gang has stopped."""

    message: str  # one line that names the culprit
    reporter: int  # the rank that shows the message
    status: int = FAILED  # exit code of all ranks
    hung: tuple[int, ...] = ()  # ranks that cannot read this; a rank on the same machine ends their processes


class GangError(Exception):
    """The gang has failed; the text is the message of `failure`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def report_failure(store: Store, failure: Failure) -> Failure:
    """Report a failure to the gang's store; returns the one that was reported first."""
    return _parse(store.compare_set(_KEY, "", json.dumps(asdict(failure))))


def read_failure(store: Store) -> Failure | None:
    """The failure that was reported first, if any."""
    return _parse(store.get(_KEY)) if store.check([_KEY]) else None


def _parse(raw: bytes) -> Failure:
    values = json.loads(raw)
    return Failure(**{**values, "hung": tuple(values["hung"])})

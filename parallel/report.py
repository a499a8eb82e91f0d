"""What a rank counts while it serves: calls, bytes, seconds, and the digests of the reuse flags it has seen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from torch.distributed import Store

__all__ = ["RankReport", "collect_reports", "file_report"]


@dataclass(slots=True)
class RankReport:
    """Counts of one rank, from the start of serving on.

    Attributes:
        rank: which.
        stage: its stage.
        slot: its place in the stage.
        layers: first layer and one past the last.
        weight_bytes: bytes of the parameters that it holds.
        load_seconds: what loading them took, if it was measured.
        items: stage calls: passes of chunks through its layers.
        item_bytes: bytes received with work items, headers counted.
        velocity_bytes: bytes received with velocities, headers counted; on the lead only.
        checkpoints: snapshots taken.
        checkpoint_bytes: bytes received with messages about checkpoints, headers counted.
        sent_bytes: bytes sent, whatever for.
        busy: seconds in its layers.
        waiting: seconds without work.
        digests: of the flags of every request that is over, as hexadecimal.
    """

    rank: int
    stage: int
    slot: int
    layers: tuple[int, int]
    weight_bytes: int = 0
    load_seconds: float = 0.0
    items: int = 0
    item_bytes: int = 0
    velocity_bytes: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    sent_bytes: int = 0
    busy: float = 0.0
    waiting: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)


def file_report(store: Store, session: int, report: RankReport) -> None:
    """Leave a rank's report for the lead."""
    store.set(f"report/{session}/{report.rank}", json.dumps(asdict(report)))


def collect_reports(store: Store, session: int, ranks: int) -> list[RankReport]:
    """The reports of all ranks, once they have left them."""
    keys = [f"report/{session}/{rank}" for rank in range(ranks)]
    store.wait(keys)
    loaded = [json.loads(raw) for raw in store.multi_get(keys)]
    return [RankReport(**{**values, "layers": tuple(values["layers"])}) for values in loaded]

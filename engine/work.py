"""Work items: what a stage needs to know to run one pass of one chunk.

The list of items in the order (tick, chunk, pass) is the meaning of the program: a chunk reads the KV that the chunk
before it wrote at the same tick. Items are plain data, so they can be printed, compared and sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.family import Pass

__all__ = ["KVOp", "WorkItem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KVOp:
    """A change of the KV buffers that happens before an item is run.

    `enter` gives a chunk a slot at the end of the window; `retire` moves the oldest chunk of the window to the clean
    region, which is then cut down to its size; `publish` copies a finished chunk's KV from branch 0 to the others.
    """

    kind: Literal["enter", "retire", "publish"]
    chunk: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """One pass of one chunk at one tick.

    Attributes:
        request: number of the request.
        tick: of the schedule; -1 for a prefix chunk.
        chunk: absolute number of the chunk.
        step: the chunk's own step; None for a pass over a finished chunk.
        chunks_left: chunks of the video still to come after this one, which captions may depend on.
        what: the pass.
        keys_from: first chunk that is attended to; None for everything that is held.
        before: changes of the KV buffers to make first.
    """

    request: int
    tick: int
    chunk: int
    step: int | None
    chunks_left: int
    what: Pass
    keys_from: int | None
    before: tuple[KVOp, ...]

"""The messages of one rank, by what they are for: work from the stage before, on to the next, results to the lead.

It knows the mesh and opens an inbox or an outbox for each edge; it does not know what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from parallel.comm.channel import Inbox, Outbox
from parallel.comm.groups import Groups
from parallel.comm.messages import Header, Kind, Message
from parallel.health.monitor import Monitor
from parallel.topology.mesh import Edge, Mesh
from parallel.trace.tracer import Tracer

_DEPTH = 3
"""Hidden states that are held ahead of the one that is computed."""
_CLOSING = 10.0
_FIRST_LANE = 2
"""Of a trace, for what is sent; before it come the main thread and decoding."""


class Edges:
    """Inboxes and outboxes of one rank.

    Args:
        mesh: this rank's place.
        groups: open process groups.
        monitor: told of lost peers, asked while waiting.
        tracer: told what is sent when.
    """

    def __init__(self, mesh: Mesh, groups: Groups, monitor: Monitor, tracer: Tracer) -> None:
        self._mesh, self._monitor, layout = mesh, monitor, mesh.layout
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}
        for edge in mesh.edges():
            if edge.source == mesh.rank:
                track = _FIRST_LANE + len(self._outboxes)
                tracer.name_track(track, f"to rank {edge.target}")
                self._outboxes[edge.target] = Outbox(
                    edge.target, groups.wires[edge], monitor.lost, partial(tracer.add, "send", track=track)
                )
            elif edge.target == mesh.rank:
                self._inboxes[edge.source] = self._inbox(edge, groups, monitor.lost, monitor.check)
        on = mesh.rank_of(mesh.stage + 1, mesh.cp_rank) if mesh.stage < mesh.last_stage else None
        self._next = None if on is None else self._outboxes[on]
        tail = mesh.rank_of(mesh.last_stage, 0)
        self.is_tail = mesh.stage == mesh.last_stage
        """This rank is of the last stage."""
        self._to_tail = self._outboxes[tail] if self.is_tail and mesh.cp_rank else None
        self._to_lead = self._outboxes[0] if mesh.rank == tail and tail else None
        self._siblings = (
            [self._outboxes[mesh.rank_of(0, cp_rank)] for cp_rank in range(1, layout.cp)] if mesh.leads else []
        )
        gathers = mesh.rank == tail
        self._parts = [
            self._inboxes[mesh.rank_of(mesh.last_stage, cp_rank)] for cp_rank in range(1, layout.cp) if gathers
        ]
        self._returns = self._inboxes[tail] if mesh.leads and tail else None
        self._before = None if mesh.leads else self._inboxes[0 if mesh.stage == 0 else mesh.rank - layout.cp]

    def _inbox(
        self, edge: Edge, groups: Groups, lost: Callable[[int, Exception], None], check: Callable[[], None]
    ) -> Inbox:
        # Results are small, and some are held until others of their step are there: no limit to them.
        depth = None if edge.target == 0 and edge.source >= self._mesh.layout.cp else _DEPTH
        return Inbox(edge.source, groups.wires[edge], device=groups.device, on_error=lost, check=check, depth=depth)

    @property
    def sent_bytes(self) -> int:
        """Bytes sent so far."""
        return sum(outbox.sent_bytes for outbox in self._outboxes.values())

    @property
    def reads_velocity(self) -> bool:
        """This rank reads the velocity out: cp_rank 0 of the tail."""
        return self.is_tail and self._mesh.cp_rank == 0

    def take(self) -> Message:
        """The next message from the stage before, or from the lead."""
        assert self._before is not None
        return self._before.take()

    def done(self, message: Message) -> None:
        """A taken message's payload is not needed any more."""
        assert self._before is not None
        self._before.done(message)

    def to_cp_rank(self, cp_rank: int, header: Header, payload: Tensor) -> None:
        """From the lead to another cp_rank of its stage."""
        self._siblings[cp_rank - 1].send(header, payload)

    def on(self, header: Header, payload: Tensor | None) -> None:
        """On to the next stage; nothing on the tail."""
        if self._next is not None:
            self._next.send(header, payload)

    def announce(self, header: Header, payload: Tensor | None = None) -> None:
        """To all who are told of requests by this rank: the lead's siblings, and the next stage."""
        for outbox in self._siblings:
            outbox.send(header, payload)
        self.on(header, payload)

    def part(self, header: Header, payload: Tensor) -> None:
        """From a cp_rank of the tail to cp_rank 0."""
        assert self._to_tail is not None
        self._to_tail.send(header, payload)

    def parts(self, header: Header) -> list[tuple[Inbox, Message]]:
        """What the other slots of the tail have for an item, by cp_rank."""
        taken = [(inbox, inbox.take()) for inbox in self._parts]
        for inbox, message in taken:
            if message.header.item != header.item:
                raise RuntimeError(f"{self._mesh.name(inbox.peer)} is out of step: it sent {message.header.item}")
        return taken

    def result(self, header: Header, velocity: Tensor) -> None:
        """From the tail to the lead."""
        assert self._to_lead is not None
        self._to_lead.send(header, velocity)

    def returned(self, *, wait: bool) -> Message | None:
        """A result, on the lead; None if there is none yet."""
        assert self._returns is not None
        if not wait:
            return self._returns.poll()
        with self._monitor.expecting():
            return self._returns.take()

    def leave(self) -> None:
        """Tell everybody that nothing more will come, hear the same from all, and close."""
        for outbox in self._outboxes.values():
            outbox.send(Header(kind=Kind.LEAVE))
        for inbox in self._inboxes.values():
            if inbox is not self._before:
                while inbox.take().header.kind is not Kind.LEAVE:
                    pass  # a result of a request that was given up
        for outbox in self._outboxes.values():
            outbox.close(_CLOSING)
        for inbox in self._inboxes.values():
            inbox.close(_CLOSING)

"""The messages of one rank by purpose: work from the stage before, on to the next stage, results to the leader.

It knows the mesh and opens an inbox or an outbox for each edge; it does not know what is computed.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from parallel.comm.channel import AHEAD, Inbox, Outbox
from parallel.comm.groups import Groups
from parallel.comm.messages import Header, Kind, Message
from parallel.comm.store import RunStore
from parallel.health.monitor import Monitor
from parallel.health.timeouts import LAST_TRANSFERS_SECONDS
from parallel.mesh import Mesh
from parallel.trace import Tracer

_FIRST_TRACK = 2
"""Of a trace, for what is sent; those before it are of the main thread and of decoding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankServices:
    """What a rank has besides its layers."""

    mesh: Mesh
    groups: Groups
    store: RunStore  # where ranks leave small things for the leader
    monitor: Monitor  # notified of what this rank does and of lost peers; checked while waiting
    tracer: Tracer


class Edges:
    """Inboxes and outboxes of one rank."""

    def __init__(self, services: RankServices) -> None:
        mesh, monitor, tracer = services.mesh, services.monitor, services.tracer
        self._mesh, cp = mesh, mesh.layout.cp
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}
        for edge, link in services.groups.links.items():
            if edge.source == mesh.rank:
                track = _FIRST_TRACK + len(self._outboxes)
                tracer.name_track(track, f"to rank {edge.target}")
                on_sent = partial(tracer.add, "send", track=track)
                self._outboxes[edge.target] = Outbox(link, monitor.lost, on_sent)
            else:
                # Results are small, and some are held until others of their step are there: no limit to them.
                result = edge.target == 0 and edge.source >= cp
                limit = None if result else AHEAD
                self._inboxes[edge.source] = Inbox(link, monitor.lost, monitor.check, limit=limit)
        # By purpose:
        self.is_tail = mesh.stage == mesh.last_stage  # this rank is of the last stage
        self.reads_velocity = self.is_tail and mesh.cp_rank == 0  # this rank computes velocities from hidden states
        tail = mesh.rank_of(mesh.last_stage, 0)
        others = range(1, cp)
        self._next = None if self.is_tail else self._outboxes[mesh.rank_of(mesh.stage + 1, mesh.cp_rank)]
        self._cp_ranks = [self._outboxes[mesh.rank_of(0, cp_rank)] for cp_rank in others if mesh.leads]
        self._parts = [
            self._inboxes[mesh.rank_of(mesh.last_stage, cp_rank)] for cp_rank in others if self.reads_velocity
        ]
        self._back = self._outboxes.get(0 if self.reads_velocity else tail) if self.is_tail else None
        self._results = self._inboxes[tail] if mesh.leads and tail else None
        self._work = None if mesh.leads else self._inboxes[0 if mesh.stage == 0 else mesh.rank - cp]

    def receive(self) -> Message:
        """The next message from the stage before, or from the leader; on every rank but the leader."""
        assert self._work is not None
        return self._work.receive()

    def to_cp_rank(self, cp_rank: int, header: Header, payload: Tensor) -> None:
        """Send from the leader to another rank of its stage."""
        self._cp_ranks[cp_rank - 1].send(header, payload)

    def send_on(self, header: Header, payload: Tensor | None = None) -> None:
        """Send to the next stage; on the last one, nothing."""
        if self._next is not None:
            self._next.send(header, payload)

    def announce(self, header: Header, payload: Tensor | None = None) -> None:
        """Send to all ranks that learn of requests from this one: others of the leader's stage, and the next stage."""
        for outbox in self._cp_ranks:
            outbox.send(header, payload)
        self.send_on(header, payload)

    def send_back(self, header: Header, payload: Tensor) -> None:
        """Send from the last stage: from its cp_rank 0 to the leader, from the others to that one."""
        assert self._back is not None
        self._back.send(header, payload)

    def receive_parts(self, header: Header) -> list[Message]:
        """The messages of the other ranks of the last stage about an item, by cp_rank; an error if another comes."""
        parts = []
        for inbox in self._parts:
            part = inbox.receive()
            if part.header.item != header.item:
                raise RuntimeError(f"{self._mesh.name(inbox.peer)} is out of step: it sent {part.header.item}")
            parts.append(part)
        return parts

    def receive_result(self, *, wait: bool) -> Message | None:
        """A result, on the leader; None if there is none yet and it should not wait."""
        assert self._results is not None
        return self._results.receive() if wait else self._results.poll()

    def leave(self) -> int:
        """Send the last message to all, receive the same from all, and close; gives the bytes that were sent in all."""
        for outbox in self._outboxes.values():
            outbox.send(Header(kind=Kind.LEAVE))
        for inbox in self._inboxes.values():
            if inbox is not self._work:
                while inbox.receive().header.kind is not Kind.LEAVE:
                    pass  # a result of a request that was cancelled
        for outbox in self._outboxes.values():
            outbox.close(LAST_TRANSFERS_SECONDS)
        for inbox in self._inboxes.values():
            inbox.close(LAST_TRANSFERS_SECONDS)
        return sum(outbox.sent_bytes for outbox in self._outboxes.values())

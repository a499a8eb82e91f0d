"""The driver's handle on one gang: finds room for it, starts its ranks, and starts them again when they are lost.

Nothing here waits: `poll` looks at what has come, so that one driver keeps many gangs going. What the gang makes, and
which of its videos go on where, is the driver's business.
"""

from __future__ import annotations

import time
from contextlib import suppress
from enum import StrEnum

from models.errors import InputError
from parallel.cluster.actor import RankTask
from parallel.cluster.connection import Exchange
from parallel.cluster.messages import Command, GangEvent, GangReady
from parallel.cluster.placement import GangShape, Placement, alive_nodes, plan_strategies
from parallel.cluster.rank_actors import GangBroken, RankActors, RankView

_NODES_EVERY, _PLACES_EVERY = 1.0, 0.2
_UNSURE = 20.0
"""Seconds until Ray has made up its mind about a node that does not answer."""
_QUIETLY = 2
"""Attempts on a node that is gone before they count as losses."""


class GangState(StrEnum):
    """How far a gang is."""

    WAITING = "waiting for a node"
    PLACING = "waiting for room"
    STARTING = "starting"
    UP = "up"
    DOWN = "given up"


class GangHandle:
    """A gang.

    Args:
        name: of the gang.
        shape: what it needs.
        task: of its ranks.
        strategy: how to place it.
        exchange: where its ranks call.

    Attributes:
        name: of the gang.
        attempt: how often it was started again.
        state: how far it is.
        stillborn: attempts since it was last ready for work that did not get so far.
    """

    def __init__(self, name: str, shape: GangShape, task: RankTask, strategy: str, exchange: Exchange) -> None:
        self.name, self.attempt, self.state = name, 0, GangState.PLACING
        self._shape, self._task, self._exchange = shape, task, exchange
        self._placement: Placement | None = Placement(shape, strategy)
        self._crew: RankActors | None = None
        self._wait_until = self._looked = 0.0
        self.stillborn = 0

    @property
    def calm(self) -> bool:
        """Nothing happens to it of which no news come."""
        return self.state is GangState.DOWN or (self._crew is not None and self._crew.calm)

    def ranks(self) -> list[RankView]:
        """The ranks that are running now."""
        crew = self._crew  # which may be gone at the next look, if another thread asks
        return [] if crew is None else crew.views()

    def poll(self) -> list[GangEvent]:
        """Take in what has come, and go on with starting.

        Returns:
            What the lead has told.

        Raises:
            GangBroken: the gang has failed; call `stop`.
            InputError: its ranks cannot start with what they were given.
        """
        if self.state is GangState.WAITING:
            self._look_for_nodes()
        if self.state is GangState.PLACING:
            self._place()
        if self._crew is None:
            return []
        try:
            events = self._crew.poll()
        except GangBroken as error:
            self._wait_until = time.monotonic() + _UNSURE if error.unsure else 0.0
            starting = self.state is GangState.STARTING
            self.stillborn += starting
            if starting and error.unsure and self.stillborn <= _QUIETLY:
                self.stop()  # on a node that is gone already: nothing is lost but this attempt
                self.state = GangState.WAITING
                return []
            raise
        if any(isinstance(event, GangReady) for event in events):
            self.state, self.stillborn = GangState.UP, 0
        return events

    def tell(self, command: Command) -> None:
        """Tell the lead something, if the gang has one."""
        if self._crew is not None:
            self._crew.tell(command)

    @property
    def ended(self) -> bool:
        """All ranks have ended, well or not."""
        return self._crew is None or self._crew.ended

    def stop(self) -> None:
        """End all ranks at once, also those that hang."""
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.kill()

    def restart(self) -> None:
        """Start again after `stop`: in the same room, or elsewhere if a node is gone."""
        self.attempt += 1
        self.state = GangState.WAITING
        self._looked = 0.0

    def give_up(self) -> None:
        """Do not start again; the room is free."""
        self.stop()
        self.state = GangState.DOWN
        self._leave_room()

    def _look_for_nodes(self) -> None:
        """Go on in the old room if it stands, else look for a new one."""
        now = time.monotonic()
        if now - self._looked < _NODES_EVERY:
            return
        self._looked = now
        nodes = alive_nodes()
        if self._placement is not None and self._placement.stands(list(nodes)):
            if now >= self._wait_until:
                self.state = GangState.PLACING
            return
        self._leave_room()
        with suppress(InputError):  # no room on the nodes that are left: others may come
            [strategy] = plan_strategies(nodes, self._shape, 1)
            self._placement = Placement(self._shape, strategy)
            self.state = GangState.PLACING

    def _place(self) -> None:
        """Start the ranks as soon as there is room."""
        now = time.monotonic()
        if self._placement is None or now - self._looked < _PLACES_EVERY:
            return
        self._looked = now
        places = self._placement.places()
        if places is not None:
            self._crew = RankActors(self._shape, self._task, self._placement, places, self.attempt, self._exchange)
            self.state = GangState.STARTING

    def _leave_room(self) -> None:
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

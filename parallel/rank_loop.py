"""The loop of every rank but the lead: take what comes, run it, hand it on.

A rank works off its stream in order and decides nothing. There is no other synchronisation.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from parallel.links import Links
from parallel.message import Header, Kind, Message, pack_values, unpack_admit, unpack_values
from parallel.stage import StageRunner
from parallel.timeline import Timeline

__all__ = ["RankLoop"]


class RankLoop:
    """Serves until the lead says that nothing more will come.

    Args:
        runner: this rank's layers.
        links: its messages.
        timeline: told how long it waited.
    """

    def __init__(self, runner: StageRunner, links: Links, timeline: Timeline) -> None:
        self._runner, self._links, self._timeline = runner, links, timeline

    def run(self) -> None:
        """Work off the stream.

        Raises:
            GangError: another rank has failed.
            FlagMismatch: the flags that this rank was told do not add up.
        """
        report = self._runner.report
        self._runner.ready()
        while True:
            began = time.perf_counter()
            message = self._links.take()
            header = message.header
            report.waiting += message.waited
            self._timeline.add("wait", began)
            if header.kind is Kind.ITEM:
                report.item_bytes += message.nbytes
                self._run(message)
            elif header.kind is Kind.ADMIT:
                assert message.payload is not None
                self._links.announce(header, message.payload)
                self._runner.admit(unpack_admit(message.payload))
            elif header.kind is Kind.RELEASE:
                self._links.announce(header)
                self._runner.release(header)
            elif header.kind is Kind.CHECKPOINT:
                report.checkpoint_bytes += message.nbytes
                self._links.announce(header, message.payload)  # first, so that all ranks write at the same time
                self._runner.save(header, Path(unpack_values(message.payload)))
            elif header.kind is Kind.SAVED:
                report.checkpoint_bytes += message.nbytes
                self._saved(message)
            elif header.kind is Kind.LEAVE:
                self._links.leave()
                report.sent_bytes = self._links.sent_bytes
                return

    def _run(self, message: Message) -> None:
        header, links, runner = message.header, self._links, self._runner
        assert message.payload is not None and header.item is not None
        hidden = runner.run(header, message.payload)
        links.done(message)
        links.on(header, hidden)
        if not header.item.what.weight:
            return  # run for its KV alone: nobody waits for its velocity
        if links.last_slot:
            parts = links.parts(header)
            velocity = runner.velocity(
                header.item, [hidden, *(part.payload for _, part in parts if part.payload is not None)]
            )
            for inbox, part in parts:
                runner.report.item_bytes += part.nbytes
                inbox.done(part)
            links.result(Header(kind=Kind.VELOCITY, request=header.request, item=header.item), velocity)
        elif links.is_tail:
            links.part(header, hidden)

    def _saved(self, message: Message) -> None:
        """The ranks before this one have their files on the disk: wait for one's own, and say so."""
        header, links = message.header, self._links
        files = unpack_values(message.payload)
        files += [asdict(shard) for shard in self._runner.saved(header.request)]
        if links.last_slot:
            for inbox, part in links.parts(header):
                self._runner.report.checkpoint_bytes += part.nbytes
                files += unpack_values(part.payload)
                inbox.done(part)
            links.result(header, pack_values(files))
        elif links.is_tail:
            links.part(header, pack_values(files))
        else:
            links.on(header, pack_values(files))

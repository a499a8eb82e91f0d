"""Ranks that exchange messages, and compute nothing."""

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.video import WorkItem
from models.protocols import Pass, PassCondition
from parallel.comm.channel import GroupTransport, Inbox, Link, Outbox
from parallel.comm.messages import Header, Kind


def separate_payloads(gang):
    """Send payloads as they are sent between GPUs: by themselves, on the main thread."""
    groups = gang._services.groups
    links = {edge: replace(link, payloads=link.headers) for edge, link in groups.links.items()}
    gang._services = replace(gang._services, groups=replace(groups, links=links))


def flood(gang, values, out):
    """Rank 0 sends more than rank 1 receives; nothing is lost, overtaken or overwritten, and `send` never waits."""
    transport = GroupTransport(1 - gang.mesh.rank)
    payloads = None if values["inline"] else transport
    link = Link(peer=1 - gang.mesh.rank, key=b"", headers=transport, payloads=payloads, device=torch.device("cpu"))
    if gang.mesh.leads:
        outbox = Outbox(link, gang.monitor.lost)
        began = time.perf_counter()
        for index in range(40):
            outbox.send(Header(kind=Kind.ITEM, request=index), torch.full((1, 50 + index // 10, 64), float(index)))
        outbox.send(Header(kind=Kind.LEAVE))
        sending = time.perf_counter() - began
        outbox.close(30)
        Path(f"{out}.seconds").write_text(json.dumps([sending, time.perf_counter() - began]))
        return
    inbox = Inbox(link, gang.monitor.lost, gang.monitor.check, limit=2)
    held, seen = [], []
    while (message := inbox.receive()).header.kind is not Kind.LEAVE:
        time.sleep(0.02)
        held.append(message)
        if len(held) == 2:  # the older one must have kept its content till now
            older = held.pop(0)
            seen.append([older.header.request, older.payload.shape[1], *older.payload.unique().tolist()])
    last = held.pop()
    seen.append([last.header.request, last.payload.shape[1], *last.payload.unique().tolist()])
    inbox.close(10)
    Path(out).write_text(json.dumps(seen))


def lost_key(gang, values, out):
    """A thread of rank 0 ends with an error that nobody has foreseen, while both ranks wait."""
    peer = 1 - gang.mesh.rank
    link = Link(peer=peer, key=b"", headers=GroupTransport(peer), payloads=None, device=torch.device("cpu"))

    def lose(began, item):
        raise KeyError("a lost key")

    if gang.mesh.leads:
        Outbox(link, gang.monitor.lost, lose).send(Header(kind=Kind.ITEM, item=some_item()))
    else:
        Inbox(link, gang.monitor.lost, gang.monitor.check, limit=2)
    while True:
        gang.monitor.check()
        time.sleep(0.05)


def some_item():
    condition = PassCondition(times=(0.0,))
    what = Pass(name="denoise", caption="text", branch=0, isolated=False, weight=1.0, condition=condition)
    return WorkItem(request=0, tick=0, chunk=0, step=0, chunks_left=0, what=what, keys_from=None, before=())

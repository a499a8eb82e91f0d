"""Tables and verdicts of the chaos benchmark. It causes nothing and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.chaos.account import Account, Fault, Loss, matched
from benchmarks.common import Cell, Headers, Rows, Verdict, columns, markdown_table
from benchmarks.ray_runs import Outcome


@dataclass(kw_only=True, slots=True)
class ChaosRun:
    """All that came of a run: first a batch that nothing disturbs, then the same videos again and again with faults."""

    wanted: int  # failures that were to be caused
    every: int  # chunks from one checkpoint to the next
    distinct: int  # videos that differ
    account: Account
    calm: Outcome = field(default_factory=Outcome)  # of the undisturbed videos
    calm_seconds: float = 0.0  # that they took
    calm_quanta: int = 0  # that they took
    disturbed: Outcome = field(default_factory=Outcome)  # of the disturbed videos
    seconds: float = 0.0  # that they took
    faults: Sequence[Fault] = ()  # that were caused
    unfinished: str = ""  # why the run was broken off; empty if it was not
    left: Mapping[int, str] = field(default_factory=dict)
    """Processes of the run that outlived it, or ranks that outlived the gangs."""

    @property
    def different(self) -> list[str]:
        """Disturbed videos whose latents are not those of the undisturbed run."""
        wanted = list(self.calm.chunks.values())
        return [
            name
            for number, (name, chunks) in enumerate(self.disturbed.chunks.items())
            if number % self.distinct >= len(wanted) or chunks != wanted[number % self.distinct]
        ]

    @property
    def good(self) -> int:
        """Faults that were noticed, and whose gangs all work again."""
        both = zip(self.faults, matched(self.faults, self.account.losses), strict=True)
        return sum(len(losses) == len(one.gangs) and all(loss.works for loss in losses) for one, losses in both)

    @property
    def not_hit(self) -> list[Loss]:
        """Gangs that were lost though nothing had hit them since they were last ready."""
        return [loss for loss in self.account.losses if not self._was_hit(loss)]

    def _was_hit(self, loss: Loss) -> bool:
        own = [one.ready for one in self.account.losses if one.gang == loss.gang and one.ready is not None]
        since = max((ready for ready in own if ready <= loss.seconds), default=0.0)
        return any(loss.gang in one.gangs and since <= one.seconds <= loss.seconds for one in self.faults)


def verdicts(run: ChaosRun) -> list[Verdict]:
    """What the run is held to."""
    account, different, faults = run.account, run.different, len(run.faults)
    videos, done = len(run.disturbed.chunks), len(run.disturbed.done)
    worst = max((loss.worst for loss in account.losses), default=0)
    wrong = len(account.violations) + len(run.disturbed.problems)
    same, most = videos - len(different), 2 * run.every
    return [
        Verdict("failures caused", str(faults), str(run.wanted), faults >= run.wanted),
        Verdict("made good", str(run.good), f"all {faults}", run.good == faults),
        Verdict("videos complete", str(done), f"all {videos}", 0 < videos == done),
        Verdict("latents as undisturbed", str(same), f"all {videos}, bit for bit", 0 < videos == same),
        Verdict("safe work done again", str(wrong), "nothing older than the last checkpoint", not wrong),
        Verdict("quanta again, most of a video and loss", str(worst), f"at most {most}", worst <= most),
        Verdict("processes left", str(len(run.left)), "0", not run.left),
        *([Verdict("finished", run.unfinished, "in time", False)] if run.unfinished else []),
    ]


def fault_rows(run: ChaosRun) -> tuple[Headers, Rows]:
    """A row for each fault; what a loss has cost stands with the first fault that it goes back to."""
    rows, seen = [], set()
    for one, losses in zip(run.faults, matched(run.faults, run.account.losses), strict=True):
        new = [loss for loss in losses if id(loss) not in seen]
        seen |= set(map(id, losses))
        row: dict[str, Cell] = {"number": one.number, "seconds": round(one.seconds, 1), "kind": one.kind}
        row |= {"how": one.how, "target": one.target, "hasty": one.hasty}
        row["lost_after_s"] = _after(one, [loss.seconds for loss in losses])
        row["ready_after_s"] = _after(one, [loss.ready for loss in losses])
        row["works_after_s"] = _after(one, [loss.works for loss in losses])
        row["videos"] = sum(len(loss.videos) for loss in new)
        row["quanta_again"] = sum(loss.quanta_again for loss in new)
        row["chunks_again"] = sum(loss.chunks_again for loss in new)
        rows.append(row)
    return columns(rows)


def _after(fault: Fault, times: Sequence[float | None]) -> float | None:
    """Seconds from a fault to the last of some times; None if one is not known."""
    known = [time - fault.seconds for time in times if time is not None]
    return round(max(known), 1) if known and len(known) == len(times) else None


def faults_table(run: ChaosRun) -> str:
    """A line for each failure."""
    headers, rows = fault_rows(run)
    return markdown_table([name.replace("_", " ") for name in headers], rows) if rows else ""


def facts(run: ChaosRun) -> str:
    """What it has cost, line by line."""
    account = run.account
    quanta = account.quanta - run.calm_quanta
    rate = run.calm_quanta / run.calm_seconds if run.calm_seconds else 0.0
    needed = (quanta - account.quanta_again) / rate if rate else 0.0
    again = f"{100 * account.quanta_again / quanta:.1f}%" if quanta else "none"
    lines = [
        f"{run.distinct} videos in {run.calm_seconds:.1f} s undisturbed, {run.calm_quanta} quanta; then "
        f"{len(run.disturbed.chunks)} in {run.seconds:.1f} s, {quanta} quanta",
        f"{account.quanta_again} quanta were done again ({again} of all); a quantum is the work of one chunk",
        f"{account.chunks_again} finished chunks came again, which were not yet covered by a checkpoint",
        f"gangs were started again {account.restarts} times, and did no work for {_down(account.losses):.0f} s, all "
        "gangs together",
        f"undisturbed the same videos would have taken {needed:.0f} s: {run.seconds - needed:.0f} s were lost",
        f"gangs lost that nothing had hit: {len(run.not_hit)}",
    ]
    lines += [*account.violations, *run.disturbed.problems, *(f"left: {pid} {name}" for pid, name in run.left.items())]
    lines += [f"other latents: {name}" for name in run.different]
    lines += [f"{name} failed: {why}" for name, why in run.disturbed.failed.items()]
    lines += [f"{loss.gang} at {loss.seconds:.1f} s, not hit: {loss.message}" for loss in run.not_hit]
    return "\n".join(f"- {line}" for line in lines)


def _down(losses: Sequence[Loss]) -> float:
    """Seconds in which gangs did no work; losses of a gang before it worked again run together."""
    total, until = 0.0, dict.fromkeys((loss.gang for loss in losses), 0.0)
    for loss in losses:
        if loss.works is not None and loss.seconds >= until[loss.gang]:
            total, until[loss.gang] = total + loss.works - loss.seconds, loss.works
    return total

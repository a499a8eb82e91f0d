"""Tables and verdicts of the chaos benchmark. It causes nothing and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.chaos_account import Accountant, Loss, Strike, matched
from benchmarks.cluster_making import Outcome
from benchmarks.report import Cell, csv_text, markdown_table
from benchmarks.verdict import Verdict

CSV = (
    "number",
    "seconds",
    "kind",
    "how",
    "whom",
    "hasty",
    "lost_after_s",
    "ready_after_s",
    "works_after_s",
    "videos",
    "quanta_again",
    "chunks_again",
)


@dataclass(kw_only=True, slots=True)
class Storm:
    """All that came of a run."""

    wanted: int  # failures that were to be caused
    every: int  # chunks from one checkpoint to the next
    distinct: int  # videos that differ; the storm makes them again and again
    account: Accountant
    calm: Outcome = field(default_factory=Outcome)  # of the undisturbed videos
    calm_seconds: float = 0.0  # that they took
    calm_quanta: int = 0  # that they took
    storm: Outcome = field(default_factory=Outcome)  # of the disturbed videos
    seconds: float = 0.0  # that they took
    strikes: Sequence[Strike] = ()  # that were caused
    unfinished: str = ""  # why the run was broken off; empty if it was not
    left: Mapping[int, str] = field(default_factory=dict)
    """Processes of the run that outlived it, or ranks that outlived the gangs."""

    @property
    def different(self) -> list[str]:
        """Videos of the storm whose latents are not those of the undisturbed run."""
        wanted = list(self.calm.chunks.values())
        return [
            name
            for number, (name, chunks) in enumerate(self.storm.chunks.items())
            if number % self.distinct >= len(wanted) or chunks != wanted[number % self.distinct]
        ]

    @property
    def good(self) -> int:
        """Strikes that were noticed, and whose gangs all work again."""
        both = zip(self.strikes, matched(self.strikes, self.account.losses), strict=True)
        return sum(len(losses) == len(one.gangs) and all(loss.works for loss in losses) for one, losses in both)

    @property
    def unstruck(self) -> list[Loss]:
        """Gangs that were lost though nobody had hit them since they were last ready."""
        return [loss for loss in self.account.losses if not self._struck(loss)]

    def _struck(self, loss: Loss) -> bool:
        before = [
            one.ready
            for one in self.account.losses
            if one.gang == loss.gang and one.ready is not None and one.ready <= loss.seconds
        ]
        since = max(before, default=0.0)
        return any(loss.gang in one.gangs and since <= one.seconds <= loss.seconds for one in self.strikes)


def verdicts(run: Storm) -> list[Verdict]:
    """What the run is held to."""
    account, videos = run.account, len(run.storm.chunks)
    different = run.different
    worst = max((loss.worst for loss in account.losses), default=0)
    wrong = len(account.violations) + len(run.storm.problems)
    return [
        _verdict("failures caused", len(run.strikes), run.wanted, len(run.strikes) >= run.wanted),
        _verdict("made good", run.good, f"all {len(run.strikes)}", run.good == len(run.strikes)),
        _verdict("videos complete", len(run.storm.done), f"all {videos}", 0 < videos == len(run.storm.done)),
        _verdict(
            "latents as undisturbed",
            videos - len(different),
            f"all {videos}, bit for bit",
            0 < videos and not different,
        ),
        _verdict("safe work done again", wrong, "nothing older than the last checkpoint", not wrong),
        _verdict("quanta again, most of a video and loss", worst, f"at most {2 * run.every}", worst <= 2 * run.every),
        _verdict("processes left", len(run.left), 0, not run.left),
    ]


def _verdict(name: str, measured: object, wanted: object, passed: bool) -> Verdict:
    return Verdict(name=name, measured=str(measured), wanted=str(wanted), passed=passed)


def _rows(run: Storm) -> list[tuple[Cell, ...]]:
    """A row for each strike; what a loss has cost stands with the first strike that it goes back to."""
    rows: list[tuple[Cell, ...]] = []
    seen: list[Loss] = []
    for one, losses in zip(run.strikes, matched(run.strikes, run.account.losses), strict=True):
        new = [loss for loss in losses if not any(loss is other for other in seen)]
        seen += new

        def after(times: list[float | None], one: Strike = one) -> float | None:
            known = [time - one.seconds for time in times if time is not None]
            return round(max(known), 1) if known and len(known) == len(times) else None

        rows.append(
            (
                one.number,
                round(one.seconds, 1),
                one.kind,
                one.how,
                one.whom,
                one.hasty,
                after([loss.seconds for loss in losses]),
                after([loss.ready for loss in losses]),
                after([loss.works for loss in losses]),
                sum(len(loss.videos) for loss in new),
                sum(loss.quanta_again for loss in new),
                sum(loss.chunks_again for loss in new),
            )
        )
    return rows


def strikes_table(run: Storm) -> str:
    """A line for each failure."""
    headers = ("", "at s", "what", "how", "whom", "at once", "lost after s", "ready", "works", "videos")
    return markdown_table((*headers, "quanta again", "chunks again"), _rows(run))


def csv(run: Storm) -> str:
    """The same as CSV."""
    return csv_text(CSV, _rows(run))


def facts(run: Storm) -> str:
    """What it has cost, line by line."""
    account = run.account
    quanta = account.quanta - run.calm_quanta
    rate = run.calm_quanta / run.calm_seconds if run.calm_seconds else 0.0
    needed = (quanta - account.quanta_again) / rate if rate else 0.0
    down = sum(_down(losses) for losses in _by_gang(account.losses).values())
    lines = [
        f"{run.distinct} videos in {run.calm_seconds:.1f} s undisturbed, {run.calm_quanta} quanta; then "
        f"{len(run.storm.chunks)} in {run.seconds:.1f} s, {quanta} quanta",
        f"{account.quanta_again} quanta were done again ({_share(account.quanta_again, quanta)} of all); a quantum is "
        "the work of one chunk",
        f"{account.chunks_again} finished chunks came again, which were not yet covered by a checkpoint",
        f"gangs were started again {account.restarts} times, and did no work for {down:.0f} s, all gangs together",
        f"undisturbed the same videos would have taken {needed:.0f} s: {run.seconds - needed:.0f} s were lost",
        f"gangs lost that nobody had hit: {len(run.unstruck)}",
    ]
    wrong = [*account.violations, *run.storm.problems, *(f"left: {pid} {name}" for pid, name in run.left.items())]
    wrong += [f"other latents: {name}" for name in run.different]
    wrong += [f"{name} failed: {why}" for name, why in run.storm.failed.items()]
    wrong += [f"{loss.gang} at {loss.seconds:.1f} s, not hit: {loss.message}" for loss in run.unstruck]
    wrong += [run.unfinished] * bool(run.unfinished)
    return "\n".join(f"- {line}" for line in [*lines, *wrong])


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "none"


def _by_gang(losses: Sequence[Loss]) -> dict[str, list[Loss]]:
    found: dict[str, list[Loss]] = {}
    for loss in losses:
        found.setdefault(loss.gang, []).append(loss)
    return found


def _down(losses: Sequence[Loss]) -> float:
    """Seconds in which a gang did no work; losses before it worked again run together."""
    total, until = 0.0, 0.0
    for loss in losses:
        if loss.works is not None and loss.seconds >= until:
            total, until = total + loss.works - loss.seconds, loss.works
    return total

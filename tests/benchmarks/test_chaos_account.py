"""The account of failures on made-up logs: what is made again is counted, and what had been safe is found."""

from dataclasses import replace

import pytest

from benchmarks.chaos.account import Account, ChaosRun, Fault, Loss, Mark, facts, fault_rows, matched, verdicts
from benchmarks.cluster import Outcome


class Story:
    """A log that is written by hand, and the checkpoints of that moment."""

    def __init__(self):
        self.marks = {}
        self.account = Account(self.marks.get)
        self.seconds = 0.0

    def say(self, event, gang="gang-0", **values):
        self.seconds += 1.0
        self.account.add({"seconds": self.seconds, "event": event, "gang": gang, **values})
        return self

    def quanta(self, *quanta, video="v", gang="gang-0"):
        for quantum in quanta:
            self.say("QuantumReady", gang, video=video, quantum=quantum)
            self.say("QuantumDone", gang, video=video, quantum=quantum)
        return self

    def chunks(self, *chunks, video="v"):
        for index in chunks:
            self.say("ChunkMade", video=video, index=index)
        return self

    def lose(self, *videos, gang="gang-0"):
        return self.say("GangLost", gang, message="rank 1 has died", videos=videos or ("v",)).say("Restarted", gang)

    def again(self, first, gang="gang-0"):
        self.say("GangReady", gang)
        return self.say("Admitted", gang, video="v", first=first)


def started():
    """A video of which six quanta are done and two chunks handed in; the checkpoint is two quanta old."""
    story = Story()
    story.say("GangReady").say("Admitted", video="v", first=0)
    story.quanta(*range(6)).chunks(0, 1)
    story.marks["v"] = Mark(quantum=4, chunks=1)
    return story


def test_a_video_that_goes_on_from_its_checkpoint_is_as_it_should_be():
    story = started().lose().again(1).quanta(4, 5, 6).chunks(1, 2)
    account = story.account
    assert not account.violations
    assert (account.quanta_again, account.chunks_again, account.restarts, account.quanta) == (2, 1, 1, 9)
    [loss] = account.losses
    assert (loss.quanta_again, loss.chunks_again, loss.worst, loss.videos) == (2, 1, 2, ("v",))
    assert loss.seconds < loss.ready < loss.works and "gang-0" in account.working


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (lambda story: story.again(1).quanta(3), "quantum 3 was done again, though those before 4 are safe"),
        (lambda story: story.again(1).quanta(4).chunks(0), "chunk 0 was made again, though those before 1 are safe"),
        (lambda story: story.again(1).quanta(4, 5, 6, 7).chunks(1, 3), "chunk 3 was handed in, and 2 was not"),
    ],
)
def test_each_breach_is_found(rest, said):
    account = rest(started().lose()).account
    assert any(said in line for line in account.violations), account.violations


def test_a_video_without_a_checkpoint_begins_again_without_blame():
    story = started()
    del story.marks["v"]
    account = story.lose().again(0).quanta(*range(6)).chunks(0, 1).account
    assert not account.violations and (account.quanta_again, account.chunks_again) == (6, 2)
    assert account.losses[0].worst == 6


def test_what_was_safe_stays_safe_over_several_losses():
    story = started().lose().again(1).quanta(4, 5)
    story.marks["v"] = Mark(quantum=2, chunks=0)
    story.lose().again(0).quanta(2).chunks(0)
    quantum, chunk = story.account.violations
    assert "quantum 2 was done again, though those before 4 are safe" in quantum
    assert "chunk 0 was made again, though those before 1 are safe" in chunk


def test_a_checkpoint_after_chunks_that_nobody_has_shows_as_a_gap():
    story = started()
    story.marks["v"] = Mark(quantum=6, chunks=3)
    assert "chunk 3 was handed in, and 2 was not" in story.lose().again(3).chunks(3).account.violations[0]


def test_quanta_that_are_done_again_without_a_loss_are_found():
    assert "no gang was lost" in started().quanta(5).account.violations[0]


def test_quanta_of_two_losses_in_a_row_are_counted_with_each():
    account = started().lose().again(1).quanta(4).lose().again(1).quanta(4, 5, 6).account
    assert [loss.quanta_again for loss in account.losses] == [1, 2] and account.quanta_again == 3
    assert not account.violations


def test_a_gang_is_good_again_once_it_has_done_a_quantum():
    story = started().lose()
    since = story.account.losses[0].seconds - 0.5
    assert not story.account.good_again("gang-0", since)
    story.again(1)
    assert not story.account.good_again("gang-0", since)
    story.quanta(4)
    assert story.account.good_again("gang-0", since)
    assert not story.account.good_again("gang-0", story.seconds)  # hit since, and nobody has noticed yet
    assert not story.account.good_again("gang-1", since)


def test_a_loss_before_a_gang_was_ready_again_belongs_to_the_same_time_without_work():
    account = started().lose().lose().again(1).quanta(4).account
    first, second = account.losses
    assert first.ready == second.ready and first.works == second.works


def fault(number=1, seconds=13.5, gangs=("gang-0",), **changes):
    return Fault(number=number, seconds=seconds, kind="rank", how="SIGKILL", target="rank 1", gangs=gangs, **changes)


def test_a_fault_is_matched_with_the_next_loss_of_each_gang_that_it_hit():
    losses = [
        Loss(gang=gang, seconds=seconds, message="", videos=())
        for gang, seconds in (("gang-0", 2.0), ("gang-1", 3.0), ("gang-0", 9.0))
    ]
    faults = [fault(seconds=1.0), fault(seconds=1.5), fault(seconds=2.5, gangs=("gang-0", "gang-1"))]
    assert matched([*faults, fault(seconds=10.0)], losses) == [[losses[0]], [losses[0]], [losses[2], losses[1]], []]


def chaos(story=None, **changes):
    """One fault at the gang of a video that goes on as it should; two videos are made, one of them twice."""
    if story is None:
        story = Story()
        story.say("GangReady").quanta(0, 1).chunks(0)
        story.marks["v"] = Mark(quantum=1)
        story.lose().again(0).quanta(1, 2).chunks(1)
    undisturbed = Outcome(chunks={"one": ["a", "b"], "two": ["c"]}, done={"one", "two"})
    made = Outcome(chunks={"video-0": ["a", "b"], "video-1": ["c"], "video-2": ["a", "b"]})
    made.done = set(made.chunks)
    run = ChaosRun(
        wanted=1,
        distinct=2,
        account=story.account,
        undisturbed=undisturbed,
        undisturbed_seconds=2.0,
        undisturbed_quanta=1,
        disturbed=made,
        seconds=20.0,
        faults=(fault(seconds=story.account.losses[0].seconds - 0.5),),
    )
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def failing(run):
    return [one.name for one in verdicts(run) if not one.passed]


def test_a_good_run_passes_and_says_what_it_cost():
    run = chaos()
    assert failing(run) == [] and run.good == 1
    (row,) = fault_rows(run)
    assert row["how"] == "SIGKILL" and row["lost_after_s"] == 0.5
    told = facts(run)
    assert "1 quanta were done again (33.3% of all)" in told
    assert "16 s were lost" in told  # of 20, for 2 quanta that take 2 s each


def test_other_latents_are_found_also_of_the_second_round():
    run = chaos()
    run.disturbed.chunks["video-2"] = ["a", "x"]
    assert failing(run) == ["latents as undisturbed"] and "other latents: video-2" in facts(run)
    run.disturbed.chunks["video-2"] = ["a"]
    assert run.different == ["video-2"]


def test_each_verdict_fails_for_itself():
    assert failing(chaos(wanted=2)) == ["failures caused"]
    assert failing(chaos(left={7: "ray::RankActor"})) == ["processes left"]
    assert failing(chaos(faults=(fault(seconds=99.0),))) == ["made good"]
    run = chaos()
    run.disturbed.done.discard("video-1")
    assert failing(run) == ["videos complete"]
    run = chaos()
    run.account.losses[0].worst = 3
    assert failing(run) == ["quanta again, most of a video and loss"]
    run = chaos()
    run.account.violations.append("v: chunk 0 was made again")
    assert failing(run) == ["safe work done again"]


def test_what_two_faults_share_is_told_once():
    run = chaos()
    one = run.faults[0]
    run.faults = (one, replace(one, number=2, hasty=True))
    rows = fault_rows(run)
    assert [row["quanta_again"] for row in rows] == [1, 0]
    assert all(rows[0][name] == rows[1][name] for name in ("lost_after_s", "ready_after_s", "works_after_s"))

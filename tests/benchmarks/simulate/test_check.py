"""Times of stages, what is predicted from them, and when a prediction holds."""

import pytest

from benchmarks.runs import make_alone
from benchmarks.simulate.check import Compared, TimedRunner, mean_timing, predict
from benchmarks.workload import ModelSpec, Workload, build

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ModelSpec(layers=3, width=192, side=32)
PLAIN = Workload(model=SPEC, chunks=2, steps=8)


def test_times_of_stages_add_up():
    pipeline = build(SPEC)
    runner = TimedRunner(pipeline.model, pipeline.attention, (1, 2))
    made = make_alone(PLAIN, pipeline, runner)
    timing = runner.timing(made.seconds)
    assert {name for name, _ in timing.calls} >= {"denoise", "clean"}
    assert sum(name == "denoise" for name, _ in timing.calls) == 8  # one for each step
    outcome = predict(PLAIN, timing, (), hop=None)
    spent = sum(outcome.busy)
    assert 0 < spent <= 2 * made.seconds  # what both stages do is counted for each, so nothing more than twice
    assert spent + timing.rest * len(outcome.spans) / 2 >= made.seconds * 0.99
    assert max(outcome.busy) <= outcome.seconds <= spent
    assert predict(PLAIN, timing, (), hop=0.1).seconds > outcome.seconds + 1
    assert mean_timing([timing, timing]) == timing


@pytest.mark.parametrize(("predicted", "passed"), [(0.95, True), (1.09, True), (1.12, False), (0.85, False)])
def test_a_prediction_holds_within_a_tenth(predicted, passed):
    one = Compared(
        workload=PLAIN,
        repeats=[(0.5, 0.6, 9.0, 1.0), (0.5, 0.6, predicted, 0.5), (0.5, 0.6, 0.1, 2.0)],
        busy=[((1.0, 1.0),) * 4],
    )
    assert one.verdict.passed is passed
    assert [row["seconds"] for row in one.rows] == ["0.50", "0.60", f"{predicted:.2f}", "1.00"]

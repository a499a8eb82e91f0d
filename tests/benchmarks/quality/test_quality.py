"""The quality benchmark as it is run, its settings, and results that outlive a run that was stopped."""

import csv
import json
from dataclasses import replace

import pytest

from benchmarks.common import run_command
from benchmarks.quality.__main__ import METHODS, STAND_INS, calibrated, curves, presets_of_pocket, run, settings_of
from benchmarks.quality.trial import LEAN, WORK, Results, Setting, label_of
from engine.request import Request
from models.errors import InputError
from tests.benchmarks.quality.test_report import reusing, trial

SETTINGS = (Setting(), reusing(method="flowcache", threshold=0.125, warmup=3, budget=2))
PRESETS = presets_of_pocket()
SLOW = PRESETS["flowcache-slow"]


def video(seed):
    return Request(prompt="a red circle moving right", chunks=2, height=64, width=64, num_steps=4, seed=seed)


def begun(path):
    results = Results(path)
    for setting in SETTINGS:
        results.add(trial(setting, 1, prompt=video(1).prompt, seconds=0.1 + 0.2))
    return results


def test_results_survive_exactly_and_what_is_missing_is_known(tmp_path):
    before = begun(tmp_path / "trials.jsonl")
    after = Results(tmp_path / "trials.jsonl")
    assert after.trials == before.trials
    assert after.missing(SETTINGS, video(1)) == [] and after.missing(SETTINGS, video(2)) == list(SETTINGS)


@pytest.mark.parametrize("rest", ['{"setting": {"meth', ""])
def test_a_line_that_was_cut_off_is_run_again(tmp_path, rest):
    path = tmp_path / "trials.jsonl"
    begun(path)
    path.write_text(path.read_text().splitlines(keepends=True)[0] + rest)
    results = Results(path)
    assert results.missing(SETTINGS, video(1)) == [SETTINGS[1]]
    results.add(trial(SETTINGS[1], 1, prompt=video(1).prompt))
    assert len(Results(path).trials) == 2


def test_damaged_results_are_named(tmp_path):
    begun(tmp_path / "trials.jsonl")
    (tmp_path / "trials.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(InputError, match="trials.jsonl is damaged"):
        Results(tmp_path / "trials.jsonl")


def curved(setting):
    """A computed fraction that falls with the threshold, for any method and kind."""
    return 0.3 + 0.7 / (1 + (setting.reuse.threshold / 0.05) ** 4) if setting.reuses else 1.0


def test_a_setting_says_what_it_is_and_what_it_is_compared_with():
    setting = Setting(reuse=replace(SLOW.reuse, reuse="velocity", extrapolate_from=0.5))
    assert not setting.reuse.clean_pass and not setting.reuse.copy_pass
    assert setting.lean and setting.reuses and setting.label == "velocity, extrapolate from 0.5"
    assert not Setting().reuses and Setting().reuse.clean_pass and Setting().reuse.copy_pass
    assert replace(setting, budget=2).plain == Setting(reuse=LEAN, budget=2)
    assert [label_of("velocity", 1.0), label_of("residual", 0.7)] == ["velocity", "residual, extrapolate from 0.7"]


def test_the_sweep_has_everything_once_and_each_has_its_reference():
    points = curves(PRESETS, (0.8, 0.5), curved, 12)
    found = settings_of(PRESETS, points, (1, 3))
    assert len(points) == 2 * 4 * 2
    assert len(found) == len(set(found)) == 2 + len({*PRESETS.values(), *points}) + 2 + 2 * 3
    assert {one.plain for one in found if one.reuses and one.budget is None} == {Setting(), Setting(reuse=LEAN)}
    assert {one.budget for one in found} == {None, 1, 3}
    assert {one.plain for one in found} <= set(found)


def test_what_was_chosen_is_swept_too():
    odd = {"flowcache-slow": Setting(reuse=replace(SLOW.reuse, reuse="residual", extrapolate_from=0.7))}
    labels = {one.label for one in curves(odd, (0.8,), curved, 12)}
    assert labels == {*(label_of(*one) for one in STAND_INS), "residual, extrapolate from 0.7"}


def test_points_compute_the_fractions_that_were_asked_for():
    for method in METHODS:
        own = [one for one in curves(PRESETS, (0.8, 0.5), curved, 12) if one.reuse.policy == method]
        assert [curved(one) for one in own] == pytest.approx([0.8, 0.5] * 4, abs=0.02)


def test_presets_are_calibrated_to_the_work_with_few_videos():
    asked = []

    def work(setting):
        asked.append(setting)
        return 0.8 * curved(setting)

    found = calibrated(PRESETS, work, 12)
    for name, target in WORK.items():
        setting = Setting(reuse=SLOW.reuse.with_threshold(found[name]))
        assert work(setting) == pytest.approx(target, abs=0.01)
        assert found[name] == float(f"{found[name]:.3g}")
    assert len(asked) <= 2 * 12 + len(WORK)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")  # two are slower at this size
def test_a_small_sweep_runs_and_goes_on_after_it_was_stopped(tmp_path, untrained_weights, capsys):
    sizes = ["--quick", "--prompts", "1", "--chunks", "2", "--steps", "4"]
    options = [*sizes, "--weights", str(untrained_weights), "--out", str(tmp_path)]
    status = run_command(run, "quality", options)
    printed = capsys.readouterr().out
    assert status == (1 if "FAIL" in printed else 0) and "operations of flowcache-slow" in printed
    (path,) = tmp_path.glob("trials-*.jsonl")
    lines = path.read_text().splitlines()
    assert len(lines) > 15
    rows, labels = list(csv.DictReader((tmp_path / "quality.csv").open())), [label_of(*one) for one in STAND_INS]
    assert len(rows) == len(lines) and {row["stands_in"] for row in rows} == {"", *labels}
    assert all(0 < float(row["computed"]) <= 1 for row in rows)
    for name in ("pareto.png", "speed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "## PSNR at equal computed fraction" in (tmp_path / "quality.md").read_text()

    path.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:40])
    assert run_command(run, "quality", options) in (0, 1)
    again = path.read_text().splitlines()
    assert again[:-3] == lines[:-3]
    for before, after in zip(lines[-3:], again[-3:], strict=True):
        first, second = json.loads(before), json.loads(after)
        assert {key: first[key] for key in first if "seconds" not in key} == {
            key: second[key] for key in second if "seconds" not in key
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--weights", "nowhere"], "nowhere"), (["--chunks", "1"], "chunks")],
)
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, options, message):
    assert run_command(run, "quality", [*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err

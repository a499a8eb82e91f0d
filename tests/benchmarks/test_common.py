"""Tables, CSV, files that appear whole or not at all, and the search for a threshold."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common import Verdict, nearest, output_folder, publish, save_text, search, table
from models.errors import InputError


def test_tables_align_numbers_right_and_keep_bars_out_of_cells():
    assert table([{"the_name": "a|b", "value": 1.23456}, {"the_name": "c", "value": 12}]).splitlines() == [
        "| the name | value |",
        "| -------- | ----: |",
        "| a\\|b     |  1.23 |",
        "| c        |    12 |",
    ]
    assert table([]) == ""


def test_a_row_of_other_cells_is_refused():
    with pytest.raises(KeyError):
        table([{"a": 1}, {"b": 1}])


def test_places_that_cannot_be_written_are_input_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        output_folder(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="missing"):
        save_text(tmp_path / "missing" / "a.md", "x")


@pytest.mark.parametrize(("passed", "status"), [((True, None), 0), ((True, False), 1), ((None, None), 0)])
def test_a_report_fails_if_one_verdict_does(tmp_path, capsys, passed, status):
    verdicts = [Verdict(f"figure {i}", "1", "2", one) for i, one in enumerate(passed)]
    sections = {"Empty": "", "Full": "text"}
    data = [{"a": 1}]
    found = publish(tmp_path, "x", title="T", about="about", verdicts=verdicts, sections=sections, data=data)
    text = (tmp_path / "x.md").read_text()
    assert found == status and text.count("FAIL") == passed.count(False) and "Empty" not in text
    assert text.strip() in capsys.readouterr().out and (tmp_path / "x.csv").read_text() == "a\n1\n"


def curved(threshold):
    return 0.3 + 0.7 / (1 + (threshold / 0.05) ** 4)


@pytest.mark.parametrize("target", [0.9, 0.8, 0.5, 0.35])
@pytest.mark.parametrize("known", [(0.001, 1.0), (0.001, 0.01), (0.2, 1.0)])
def test_thresholds_are_found_between_known_ones_and_beyond_them(target, known):
    measured = search(curved, target, {one: curved(one) for one in known}, tries=12, near=0.02, geometric=True)
    found = nearest(measured, target)
    assert curved(found) == pytest.approx(target, abs=0.02)
    assert len(measured) <= 2 + 12 and found == float(f"{found:.3g}")


def test_bounds_are_not_measured_and_halved():
    asked = []

    def measure(place):
        asked.append(place)
        return 1 - place

    search(measure, 0.3, {0.0: math.inf, 1.0: -math.inf}, tries=4)
    assert asked == [0.5, 0.75, 0.625, 0.6875]


def test_what_is_known_well_enough_is_not_measured_again():
    def measure(threshold):
        raise AssertionError("there was no need")

    assert nearest(search(measure, 0.5, {0.01: 0.9, 0.1: 0.51, 1.0: 0.3}, tries=5, near=0.02), 0.5) == 0.1


@given(jumps=st.lists(st.floats(0.05, 1), min_size=2, max_size=8), target=st.floats(0, 1), tries=st.integers(0, 6))
def test_the_nearest_that_was_measured_is_taken_however_values_jump(jumps, target, tries):
    known = {0.001 * 2**i: value for i, value in enumerate(jumps)}
    search(lambda one: jumps[int(one * 1e6) % len(jumps)], target, known, tries=tries, near=0.02, geometric=True)
    assert len(known) <= len(jumps) + tries
    found = nearest(known, target)
    assert abs(known[found] - target) == min(abs(one - target) for one in known.values())

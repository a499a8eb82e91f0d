"""Tables, CSV, and files that appear whole or not at all."""

import os

import pytest
from matplotlib.figure import Figure

from benchmarks.report import csv_text, machine_line, markdown_table, output_folder, save_figure, save_text
from models.errors import InputError


def test_tables_align_numbers_right_and_keep_bars_out_of_cells():
    table = markdown_table(("name", "value"), [("a|b", 1.23456), ("c", 12)])
    assert table.splitlines() == [
        "| name | value |",
        "| ---- | ----: |",
        "| a\\|b |  1.23 |",
        "| c    |    12 |",
    ]


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="argument"):
        markdown_table(("a", "b"), [(1,)])


def test_csv_quotes_what_needs_it_and_leaves_unknown_cells_empty():
    assert csv_text(("a", "b", "c"), [("x, y", None, 0.123456789)]) == 'a,b,c\n"x, y",,0.123457\n'


def test_the_machine_is_one_line_with_what_matters():
    line = machine_line()
    assert f"{os.cpu_count()} cores" in line and "PyTorch" in line and "\n" not in line


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path):
    path = tmp_path / "figure.nonsense"
    path.write_text("old")
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(path, Figure())
    assert [file.name for file in tmp_path.iterdir()] == ["figure.nonsense"] and path.read_text() == "old"


def test_text_ends_with_one_newline(tmp_path):
    save_text(tmp_path / "a.md", "x")
    save_text(tmp_path / "b.md", "x\n")
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes() == b"x\n"


def test_places_that_cannot_be_written_are_input_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        output_folder(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="missing"):
        save_text(tmp_path / "missing" / "a.md", "x")

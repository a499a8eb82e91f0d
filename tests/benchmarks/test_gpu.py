"""The benchmark of one GPU, with tiny shapes on a CPU."""

import json

from benchmarks import gpu
from benchmarks.common import run_command


def run(folder, *arguments):
    return run_command(gpu.main, "gpu", ["--device", "cpu", "--preset", "tiny", "--out", str(folder), *arguments])


def test_parts_are_written_and_not_measured_again(tmp_path):
    assert run(tmp_path, "--only", "projection", "--only", "passes", "--only", "decode") == 0
    passes = json.loads((tmp_path / "passes.json").read_text())
    assert [row["keys, chunks"] for row in passes] == [1, 2, 3, 4, 5]
    assert all(row["ms"] > 0 and row["TFLOP/s"] > 0 for row in passes)
    assert passes[4]["TFLOP"] > passes[0]["TFLOP"]
    ways = json.loads((tmp_path / "projection.json").read_text())
    assert ways[0]["relative error"] < 1e-5 < 1e-4 < ways[-1]["relative error"] < 1e-2
    report = (tmp_path / "gpu.md").read_text()
    assert "## passes" in report and "## decode" in report and "## attention" not in report
    (tmp_path / "passes.json").write_text("[]")
    assert run(tmp_path, "--only", "passes") == 0
    assert (tmp_path / "passes.json").read_text() == "[]"


def test_bad_input_is_one_line(tmp_path, capsys):
    assert run(tmp_path, "--only", "nothing") == 2
    assert run(tmp_path, "--preset", "huge") == 2
    said = capsys.readouterr().err.splitlines()
    assert "unknown part 'nothing'" in said[0] and "unknown preset 'huge'" in said[1] and len(said) == 2

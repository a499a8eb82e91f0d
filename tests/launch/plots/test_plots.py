"""Plots of records: what the figures hold, and the files that the command writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from engine.record import NOT_ACTIVE, RunRecord
from launch.cli import run
from launch.plots import PLOTS, distance_figure, kv_figure, plot, reuse_figure
from launch.plots.record import reuse_table
from models.errors import InputError
from tests.launch.plots.records import SETTINGS, made_up_record
from tests.launch.process import environment, short_files

OUTSIDE = 3  # state of a cell of the map of reuse


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a record in `run`."""
    monkeypatch.chdir(tmp_path)
    made_up_record().save(Path("run"))
    return tmp_path


def _texts(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# ---- what was computed


def test_the_map_is_what_was_decided() -> None:
    record = made_up_record(extrapolate_from=0.5)
    figure = reuse_figure(record)
    shown = figure.axes[0].images[0].get_array()
    assert np.array_equal(np.where(shown == OUTSIDE, NOT_ACTIVE, shown), record.flags.T)
    texts = _texts(figure)
    for state in ("computed", "reused", "extrapolated", "not in the window"):
        assert state in texts
    assert f"{record.computed_fraction:.0%} computed" in texts
    assert '"a red circle moving right", magi-pocket, 6 chunks of 16 steps' in texts


def test_steps_that_all_chunks_share_are_a_table() -> None:
    """One row of decisions and distances for all chunks, as of a distance that looks at no latents."""
    record = made_up_record()
    assert reuse_table(record) == []
    shared = replace(
        record, decisions=record.decisions[:1].repeat(6, axis=0), changes=record.changes[:1].repeat(6, axis=0)
    )
    first, _, *steps = reuse_table(shared)
    assert "same steps" in first and len(steps) == 16
    assert [line.split()[2] for line in steps] == [("computed", "reused")[state] for state in shared.decisions[0]]
    assert steps[0].split()[1] == "-" and float(steps[1].split()[1]) == pytest.approx(record.changes[0, 1], abs=1e-6)


def test_the_bars_are_the_computed_shares() -> None:
    record = made_up_record()
    bars = reuse_figure(record).axes[1].patches[-6:]
    shares = (record.flags == 0).sum(axis=0) / 16
    assert [bar.get_width() for bar in bars] == pytest.approx(shares.tolist())
    assert 0 < shares.min() < shares.max() < 1


def test_what_does_not_occur_is_not_in_the_legend() -> None:
    texts = _texts(reuse_figure(made_up_record(threshold=0)))
    assert "100% computed" in texts and "extrapolated" not in texts
    assert "not in the window" not in _texts(reuse_figure(made_up_record(1)))
    assert "reused" not in _texts(distance_figure(made_up_record(threshold=0)))
    assert "reused" in _texts(distance_figure(made_up_record()))


def test_chunks_of_a_prefix_are_given() -> None:
    figure = reuse_figure(made_up_record(first=2))
    assert "given" in _texts(figure) and "4 chunks of 16 steps" in _texts(figure)
    assert "given" not in _texts(reuse_figure(made_up_record()))


def test_rows_of_a_long_video_begin_where_its_chunks_do() -> None:
    record = made_up_record(120)
    shown = reuse_figure(record).axes[0].images[0].get_array()
    assert shown.shape == (120, 16)
    assert np.array_equal(shown[119], record.flags[record.flags[:, 119] != NOT_ACTIVE, 119])


# ---- distances


def test_one_line_of_distances_for_each_chunk() -> None:
    record = made_up_record()
    axes = distance_figure(record).axes[0]
    lines = {line.get_label(): line for line in axes.lines if str(line.get_label()).startswith("chunk")}
    assert len(lines) == 6 and axes.get_yscale() == "log"
    steps = record.distances[record.flags[:, 4] != NOT_ACTIVE, 4]
    assert lines["chunk 4"].get_xdata()[8] == 50  # percent
    assert np.allclose(lines["chunk 4"].get_ydata(), steps, equal_nan=True)


def test_dots_say_which_steps_were_reused() -> None:
    record = made_up_record(1)
    computed, reused = distance_figure(record).axes[0].lines[1:3]
    assert len(computed.get_xdata()) == (record.flags == 0).sum()
    assert len(reused.get_xdata()) == (record.flags == 1).sum() > 0
    assert reused.get_markerfacecolor() == "white" != computed.get_markerfacecolor()


def test_many_lines_have_a_median_and_a_colour_bar() -> None:
    figure = distance_figure(made_up_record(60))
    axes, bar = figure.axes
    assert len(axes.lines) == 61 and bar.get_ylabel() == "chunk"
    median = axes.lines[-1].get_ydata()
    assert median[8] == pytest.approx(2 * 0.006 * np.exp(2.6 / 4), rel=1e-4)  # of factors 1, 2 and 3


def test_a_run_without_distances_says_so() -> None:
    record = made_up_record()
    record.changes[:] = np.nan
    assert "no distance was taken" in _texts(distance_figure(record))
    assert "no distance was taken" not in _texts(distance_figure(made_up_record()))


# ---- what was kept


def test_the_heat_map_is_what_was_kept() -> None:
    record = made_up_record()
    figure = kv_figure(record)
    image = figure.axes[0].images[0]
    shown = image.get_array()
    assert image.get_extent()[:2] == [4, 9]  # the first chunk leaves when the fifth enters
    for chunk in range(5):
        for when in range(5):
            if chunk > when:
                assert shown.mask[chunk, when]  # not finished yet
            else:
                assert shown[chunk, when] == record.kept[when, chunk]
    assert shown[4, 4] == 1 and shown[3, 4] == 0.5
    assert "100% = 12.3 MB" in _texts(figure)


def test_the_fill_is_that_of_the_buffer() -> None:
    record = made_up_record()
    line = kv_figure(record).axes[1].lines[0]
    assert np.array_equal(line.get_ydata()[:-1], record.fill)
    assert line.get_xdata()[-1] == 9  # chunks of time: 6 and 3 more until the window is empty


def test_a_single_chunk_keeps_nothing() -> None:
    assert "no chunk has left the window" in _texts(kv_figure(made_up_record(1)))


# ---- any record can be drawn


@pytest.mark.parametrize("kind", PLOTS)
@pytest.mark.parametrize(
    "record",
    [
        made_up_record(1),
        made_up_record(2, num_steps=4),
        made_up_record(first=3),
        made_up_record(60, num_steps=64),
        made_up_record(settings={"prompt": "", "kv_bytes": 10**400}),
        made_up_record(settings={"prompt": "$x^2 a\ncat \N{CJK UNIFIED IDEOGRAPH-732B} \udc80 " * 9, "kv_bytes": "?"}),
        made_up_record(settings=SETTINGS | {"cache": 3, "kv": [], "cache_preset": None}),
    ],
    ids=["one chunk", "four steps", "prefix", "60 chunks", "prompt alone", "odd prompt", "odd settings"],
)
def test_no_record_makes_trouble(tmp_path: Path, kind: str, record: RunRecord) -> None:
    record.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(kind, tmp_path, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 1000 and len(image.getcolors(1 << 24) or ()) > 10


# ---- the command


@pytest.mark.parametrize("kind", PLOTS)
def test_plots_go_into_the_record_or_where_they_are_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert run(["plot", kind, "run"]) == 0
    assert capsys.readouterr().out == f"run/{kind}.png\n"
    assert run(["plot", kind, "run", "--out", "other.PNG"]) == 0
    assert capsys.readouterr().out == "other.PNG\n"
    assert sorted(os.listdir("run")) == sorted(["record.json", "record.npz", f"{kind}.png"])
    assert Path("other.PNG").read_bytes() == (Path("run") / f"{kind}.png").read_bytes()
    assert sorted(os.listdir(folder)) == ["other.PNG", "run"]


@pytest.mark.slow
def test_a_plot_leaves_matplotlib_as_it_was(folder: Path) -> None:
    code = (
        "import sys, launch.cli; status = launch.cli.run(['plot', 'kv', 'run']); "
        "sys.exit(status or 'matplotlib.pyplot' in sys.modules or 'matplotlib' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_a_full_disk_leaves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel refuses to let files grow beyond 10 kB; the older picture stays."""
    Path("run/reuse.png").write_bytes(b"old")
    with short_files(10_000):
        assert run(["plot", "reuse", "run"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("flowcache: error: cannot write run/reuse.png")
    assert sorted(os.listdir("run")) == ["record.json", "record.npz", "reuse.png"]
    assert Path("run/reuse.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reuse", "missing"], "missing holds no record: record.json is missing"),
        (["reuse", "."], ". holds no record: record.json is missing"),
        (["reuse", "run/record.json"], "run/record.json holds no record: it is not a folder"),
        (["kv", "run", "--out", "plot.jpg"], "the name of the picture must end in .png"),
        (["distance", "run", "--out", "missing/plot.png"], "the folder missing does not exist"),
        (["speed", "run"], "No such command 'speed'"),
        (["kv"], "Missing argument 'RUN_DIR'"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(["plot", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("flowcache: error: ") and said in shown.err
    assert shown.err.count("\n") == 1
    assert sorted(os.listdir(folder)) == ["run"] and len(os.listdir("run")) == 2


# ---- damaged records


def _without(name: str) -> Callable[[], None]:
    return lambda: Path("run", name).unlink()


def _replaced(**arrays: np.ndarray) -> Callable[[], None]:
    def damage() -> None:
        with np.load("run/record.npz") as file:
            held = dict(file)
        np.savez("run/record.npz", **(held | arrays))

    return damage


def _left_out() -> None:
    with np.load("run/record.npz") as file:
        np.savez("run/record.npz", span=file["span"])


def _claims(shape: tuple[int, ...]) -> Callable[[], None]:
    """Arrays whose headers speak of more numbers than there are."""

    def damage() -> None:
        header = str({"descr": "<i8", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
        array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        with zipfile.ZipFile("run/record.npz", "w") as packed:
            for name in ("span", "decisions", "changes", "tick_seconds", "tick_items", "fill", "held"):
                packed.writestr(f"{name}.npy", array)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_claims((10**11,)), "damaged"),
        (_claims((10**30,)), "damaged"),
        (lambda: Path("run/record.json").write_text("[" * 100_000), "damaged"),
        (_without("record.json"), "record.json is missing"),
        (_without("record.npz"), "record.npz is missing"),
        (lambda: Path("run/record.json").write_text("{"), "damaged"),
        (lambda: Path("run/record.json").write_text("[]"), "record.json is not a JSON object"),
        (lambda: Path("run/record.json").write_text('{"a": []}'), "record.json has no prompt, so it is no record's"),
        (lambda: Path("run/record.json").write_text('{"prompt": ["a"]}'), "record.json has no prompt"),
        (lambda: Path("run/record.json").write_bytes(b'{"prompt": "\xff"}'), "damaged"),
        (lambda: Path("run/record.npz").write_bytes(b""), "damaged"),
        (lambda: os.truncate("run/record.npz", 900), "damaged"),
        (lambda: np.save(Path("run/record.npz").open("wb"), np.zeros(3)), "damaged"),
        (_left_out, "decisions"),
        (_replaced(span=np.array([0, 6, 16, 5])), "16 steps do not divide into a window of 5"),
        (_replaced(span=np.array([0.0, 6, 16, 4])), "the span is no schedule"),
        (_replaced(span=np.array([0, 7, 16, 4])), "decisions are uint8 [6, 16], not numbers [7, 16]"),
        (_replaced(decisions=np.full((6, 16), 9, dtype=np.uint8)), "the decisions are no table of flags"),
        (_replaced(decisions=np.zeros(36, dtype=np.uint8)), "decisions are uint8 [36], not numbers [6, 16]"),
        (_replaced(decisions=np.full((6, 16), NOT_ACTIVE, dtype=np.uint8)), "the decisions are no table of flags"),
        (_replaced(fill=np.zeros(35)), "fill are float64 [35], not numbers [36]"),
        (_replaced(held=np.full((6, 3), "x")), "held are <U1 [6, 3], not numbers [6, 3]"),
        (_replaced(held=np.full((6, 3), 6.0)), "held names chunks that the video does not have"),
        (_replaced(held=np.full((6, 3), None)), "damaged"),
    ],
)
def test_damaged_records_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[], object], said: str
) -> None:
    damage()
    assert run(["plot", "reuse", "run"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("flowcache: error: ") and said in shown and shown.count("\n") == 1
    assert not Path("run/reuse.png").exists()


def test_a_changed_byte_is_found_or_does_not_matter(folder: Path) -> None:
    good, whole = RunRecord.load(Path("run")), Path("run/record.npz").read_bytes()
    found = 0
    for place in range(0, len(whole), 7):
        Path("run/record.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            record = RunRecord.load(Path("run"))
        except InputError:
            found += 1
        else:
            assert np.array_equal(record.flags, good.flags) and np.array_equal(record.kept, good.kept)
            assert np.array_equal(record.distances, good.distances, equal_nan=True)
    assert found > len(whole) / 7 / 2


# ---- saving


def test_a_record_replaces_an_older_one(folder: Path) -> None:
    made_up_record(3, settings={"prompt": "another"}).save(Path("run"))
    record = RunRecord.load(Path("run"))
    assert record.flags.shape == (24, 3) and record.settings == {"prompt": "another"}
    assert sorted(os.listdir("run")) == ["record.json", "record.npz"]
    with zipfile.ZipFile("run/record.npz") as packed:
        assert packed.testzip() is None
    assert json.loads(Path("run/record.json").read_text()) == {"prompt": "another"}


def test_a_record_that_cannot_be_written_is_no_record(folder: Path) -> None:
    os.remove("run/record.npz")
    os.mkdir("run/record.npz")
    with pytest.raises(InputError, match="cannot write the record run"):
        made_up_record(3).save(Path("run"))
    assert os.listdir("run") == ["record.npz"]
    shutil.rmtree("run/record.npz")
    with pytest.raises(InputError, match="run holds no record"):
        RunRecord.load(Path("run"))

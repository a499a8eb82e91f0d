"""Failures around a batch: the small disk, damage, and what each kind is held to."""

import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.chaos.batch import DISK, Harm, Place, run_batches, small_disk
from benchmarks.chaos.faults import Kind
from models.errors import InputError

GOOD = Harm(kind=Kind.DRIVER, status=143, seconds=0.5, again=0, right=3, left=(), said="stopped by SIGTERM")


def test_each_figure_fails_for_itself():
    assert GOOD.verdict.passed and GOOD.row["ended_after_s"] == 0.5
    for changes in ({"status": 0}, {"again": 1}, {"right": 2}, {"left": ("raylet",)}, {"said": ""}):
        assert not replace(GOOD, **changes).verdict.passed
    assert replace(GOOD, kind=Kind.DISK, status=2).verdict.passed
    assert replace(GOOD, kind=Kind.GCS, status=1).verdict.passed


def test_files_come_oldest_first_and_videos_have_digests(tmp_path):
    place = Place(folder=tmp_path, inside=tmp_path)
    for name in ("b", "a"):
        (tmp_path / f".{name}").mkdir()
        (tmp_path / f".{name}" / "000000.mp4").write_text(name)
    assert [path.read_text() for path in place.files(".*/*.mp4")] == ["b", "a"]
    (tmp_path / "x.mp4").write_text("x")
    assert list(place.videos()) == ["x.mp4"] and len(place.videos()["x.mp4"]) == 64


def test_a_small_disk_is_full_for_those_inside_and_gone_afterwards(tmp_path):
    try:
        with small_disk(tmp_path) as place:
            command = ["dd", "if=/dev/zero", f"of={place.inside.parent}/filler", "bs=1M", f"count={DISK + 1}"]
            ended = subprocess.run([*place.enter, *command], capture_output=True, text=True, check=False)
            assert ended.returncode and "No space left" in ended.stderr
            filler = place.folder.parent / "filler"
            assert filler.stat().st_size == DISK * 2**20
            filler.unlink()
            assert (
                subprocess.run([*place.enter, *command[:-1], "count=1"], capture_output=True, check=False).returncode
                == 0
            )
            assert not list((tmp_path / "disk").iterdir())  # it is mounted for those inside alone
    except InputError as error:
        pytest.skip(str(error))


# Stands for `flowcache batch`: chunks and a checkpoint, a while to be hit in, and then the videos. Called again, it
# looks at what is there before it goes on; how carefully is its argument.
STAND_IN = """
import pathlib, shutil, signal, sys, time
care, out = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), sys.exit(143)))
files = [out / ".checkpoints" / "x" / "segments-libx264" / name for name in ("0.mp4", "1.mp4")]
files += [out / ".checkpoints" / "x" / name for name in ("rank-0.safetensors", "manifest.json")]
for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and care == "careful" and file.read_bytes() != b"chunk" * 4000:
        print(f"{file} does not match its checksum")
        file.unlink()
    if not file.exists():
        file.write_bytes(b"chunk" * 4000)
time.sleep(2)
for video in range(3):
    (out / f"{video}.mp4").write_bytes(files[0].read_bytes())
shutil.rmtree(out / ".checkpoints")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("care", "status"), [("careful", 0), ("careless", 1)])
def test_a_command_that_reads_damage_without_looking_is_found(tmp_path, capsys, care, status):
    program = (sys.executable, "-c", STAND_IN, care)
    kinds = (Kind.DRIVER, Kind.PART, Kind.CHECKPOINT)
    assert run_batches(tmp_path, kinds, lambda line: None, program) == status
    text = capsys.readouterr().out
    assert [f"batch, {kind}" in text for kind in kinds] == [True] * 3
    assert text.count("PASS") == (3 if care == "careful" else 1)
    if care == "careless":
        assert "0 right, status 143, then 0" in text  # the damaged chunk is in the videos
    assert len((tmp_path / "chaos_batch.csv").read_text().splitlines()) == 1 + 3

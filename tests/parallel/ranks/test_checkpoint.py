"""Checkpoints: what is whole is found and taken up bit for bit, what is not is passed over."""

import json
import os
import queue
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from engine.checkpoint.contents import Contents
from engine.checkpoint.files import (
    Checkpoint,
    CheckpointConfig,
    Shard,
    commit,
    discard,
    new_folder,
    newest,
    read_contents,
    write_async,
)
from engine.files import Damaged
from models.errors import InputError
from parallel.comm.messages import HEADER_BYTES
from parallel.health.failure import GangError
from tests.parallel.on_ranks import run
from tests.parallel.ranks.test_pipeline import FLOWCACHE, HIDDEN, TOKENS, alone, close, same

# ---- files


def contents():
    return Contents(tensors={"a": torch.ones(3, 40), "b": torch.arange(5)}, values={"x": [1, None, 0.1]})


def write(folder, quantum):
    """A checkpoint that is complete but for its manifest."""
    with suppress(OSError):
        folder.mkdir(parents=True)
    place, done = new_folder(folder, quantum), queue.SimpleQueue()
    write_async(place, {name: contents() for name in ("rank-0.safetensors", "run.safetensors")}, done.put)
    shards = done.get(timeout=10)
    if isinstance(shards, Exception):
        raise shards
    return Checkpoint(folder=place, quantum=quantum, counts={"chunks": quantum}, fingerprint={}, shards=shards)


def whole(folder, quantum):
    """A checkpoint beside the others, as if there had been no time to delete them."""
    aside = folder.parent / "aside"
    made = write(aside, quantum)
    commit(made)
    folder.mkdir(exist_ok=True)
    return made.folder.rename(folder / made.folder.name)


def test_what_was_written_is_read(tmp_path):
    made = write(tmp_path / "new" / "video", 3)
    commit(made)
    found = newest(tmp_path / "new" / "video")
    assert found == made
    read = read_contents(found.folder, "run.safetensors")
    assert read.values == contents().values
    for name, part in contents().tensors.items():
        assert torch.equal(read.tensors[name], part)
    assert not list(tmp_path.rglob("*.part"))


def test_one_without_a_manifest_does_not_exist(tmp_path):
    assert newest(tmp_path / "nowhere") is None
    first = write(tmp_path, 3)
    assert newest(tmp_path) is None
    commit(first)
    write(tmp_path, 4)
    assert newest(tmp_path).quantum == 3


def test_the_last_two_stay_and_other_files_are_left_alone(tmp_path):
    """Older ones go, whole or not; what is later is not touched, and a spare is there if the newest is damaged."""
    (tmp_path / "notes.txt").write_text("mine")
    later = write(tmp_path, 20)  # of an attempt that is still at it
    names = []
    for quantum in (4, 9, 10):
        write(tmp_path, quantum - 1)  # never finished
        made = write(tmp_path, quantum)
        commit(made)
        names.append(made.folder.name)
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == sorted(["notes.txt", *names[1:], later.folder.name])
    os.truncate(tmp_path / names[2] / "run.safetensors", 5)
    assert newest(tmp_path).quantum == 9
    discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_newest_is_that_of_the_latest_quantum(tmp_path):
    for quantum in (10, 9, 100):
        whole(tmp_path / "video", quantum)
    assert newest(tmp_path / "video").quantum == 100


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def edit(path):
    manifest = json.loads(path.read_text())
    manifest["manifest"]["quantum"] = 4
    path.write_text(json.dumps(manifest))


SHARD, MANIFEST = "rank-0.safetensors", "manifest.json"


def hole(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])


def folder_for(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "a shard has zeros in the middle": lambda place: hole(place / SHARD),
    "a shard is a folder": lambda place: folder_for(place / SHARD),
    "a shard is a pipe": lambda place: ((place / SHARD).unlink(), os.mkfifo(place / SHARD)),
    "a shard is cut off": lambda place: os.truncate(place / SHARD, 200),
    "a shard is empty": lambda place: os.truncate(place / SHARD, 0),
    "a bit of a shard is flipped": lambda place: flip(place / SHARD, -3),
    "a shard is missing": lambda place: (place / SHARD).unlink(),
    "the manifest is missing": lambda place: (place / MANIFEST).unlink(),
    "the manifest is garbage": lambda place: (place / MANIFEST).write_bytes(os.urandom(300)),
    "the manifest is cut off": lambda place: os.truncate(place / MANIFEST, 100),
    "the manifest is another JSON": lambda place: (place / MANIFEST).write_text("[1, 2]"),
    "the manifest is changed": lambda place: edit(place / MANIFEST),
    "the manifest is a folder": lambda place: folder_for(place / MANIFEST),
    "the manifest is a pipe": lambda place: ((place / MANIFEST).unlink(), os.mkfifo(place / MANIFEST)),
    "the manifest is too deep": lambda place: (place / MANIFEST).write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_passed_over(tmp_path, damage):
    video = tmp_path / "video"
    whole(video, 3)
    damage(whole(video, 5))
    found = newest(video)
    assert found is not None and found.quantum == 3
    damage(found.folder)
    assert newest(video) is None


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_said_and_not_read(tmp_path, damage):
    """Of a manifest that is missing nothing is said: every checkpoint begins so."""
    place, said = whole(tmp_path / "video", 3), []
    damage(place)
    assert newest(tmp_path / "video", on_damage=lambda folder, error: said.append((folder, str(error)))) is None
    missing = not (place / MANIFEST).exists()
    assert [folder for folder, _ in said] == ([] if missing else [place])
    assert all(name.split()[0] in (str(place / SHARD), str(place / MANIFEST)) for _, name in said)
    with pytest.raises(Damaged, match=str(place)):
        read_contents(place, SHARD)


def test_one_that_comes_after_what_is_stored_is_of_no_use(tmp_path):
    for quantum in (3, 5):
        whole(tmp_path / "video", quantum)
    for stored, quantum in ((None, 5), (5, 5), (4, 3), (3, 3)):
        assert newest(tmp_path / "video", stored=stored).quantum == quantum
    assert newest(tmp_path / "video", stored=2) is None


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    """No file may grow beyond some bytes, as on a disk with no room left; what is whole stays so."""
    commit(write(tmp_path, 3))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*rank-0.safetensors: no space left") as caught:
            write(tmp_path, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert newest(tmp_path).quantum == 3
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the checkpoint file"):
        write(tmp_path / "file", 5)
    made = Checkpoint(folder=tmp_path / "gone", quantum=1, counts={}, fingerprint={}, shards=())
    with pytest.raises(InputError, match="manifest.json: No such file"):
        commit(made)


def test_what_differs_is_named():
    shards = (Shard(file="x", nbytes=1, digest=""),)
    then = {"layout": {"pp": 2}, "kv": {"budget": 1}}
    made = Checkpoint(folder=Path("p"), quantum=1, counts={}, fingerprint=then, shards=shards)
    made.check_fits({"kv": {"budget": 1}, "layout": {"pp": 2}})
    with pytest.raises(InputError, match=r'another layout: \{"pp": 2\}, now \{"pp": 4\}'):
        made.check_fits({**then, "layout": {"pp": 4}})
    with pytest.raises(InputError, match="another reuse"):
        made.check_fits({**then, "reuse": {}})


def test_a_plan_without_a_rhythm_is_refused(tmp_path):
    with pytest.raises(InputError, match="every 0 chunks"):
        CheckpointConfig(folder=tmp_path, every=0)


# ---- ranks


def quanta(got):
    """The quanta of the whole checkpoints that there have been at a time."""
    return [[int(name.removeprefix("quantum-")) for name in names] for names in got["wholes"]]


def files(folder, video):
    paths = sorted(folder.glob(f"{video}-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    return [torch.load(path) for path in paths]


def together(tmp_path, layout, values):
    """Run until somebody is killed, look at what there is, and go on; the latents are those of one process."""
    folder = tmp_path / "kept"
    folder.mkdir()
    values = {**values, "folder": str(folder)}
    with pytest.raises(GangError):
        run(tmp_path, "kept", **layout, **values)
    made = [len(files(folder, video)) for video in range(len(values["every"]))]
    del values["kill"]
    found = newest(folder / "video-0")
    assert found is not None
    assert found.counts["chunks"] <= made[0]
    first = found.counts["chunks"]
    for index in range(first, made[0]):
        (folder / f"0-{index}.pt").unlink()  # it is handed out again
    expected, _ = alone(values)
    return folder, values, found, expected


@pytest.mark.slow
def test_two_videos_one_of_them_kept_over_two_stages(tmp_path):
    """Compressed KV, reuse, a clip; the lead is killed. Another layout is refused, a damaged newest passed over."""
    values = {
        "budget": 1,
        "config": {"ranges": ()},
        "cache": FLOWCACHE,
        "requests": [{"chunks": 7, "prefix": 32}, {"chunks": 3, "seed": 8}],
        "every": [2, 0],
        "kill": {"quantum": "quantum-00000004", "steps": 5},
    }
    folder, values, found, expected = together(tmp_path, {"pp": 2}, values)
    assert found.quantum % 2 == 0 and found.quantum >= 4
    damaged = shutil.copytree(found.folder, found.folder.with_name("quantum-00000099-00000000"))
    os.truncate(damaged / "rank-1.safetensors", 1000)
    with pytest.raises(GangError, match="was made with another layout"):
        run(tmp_path, "kept", pp=1, **values)
    got = run(tmp_path, "kept", pp=2, **values)
    assert got["resumed"] == [found.counts["chunks"], 0]
    same([files(folder, 0), files(folder, 1)], expected)
    made = quanta(got)
    assert max(len(names) for names in made) <= 3  # two, and the damaged one, which is later than all
    assert {quantum for names in made for quantum in names} - {99} <= {quantum for quantum in range(2, 11, 2)}
    assert len(list((folder / "video-0").iterdir())) <= 4  # those, and one that the end has overtaken
    assert not list(folder.glob("video-1"))


@pytest.mark.slow
def test_a_video_goes_on_over_two_stages_of_two(tmp_path):
    """A rolling KV whose chunks are renewed, after an image; the lead is killed at some point after a checkpoint.

    It was made with finished chunks in host memory, and is gone on with without.
    """
    values = {
        "config": {"guided": True},
        "offload": True,
        "cache": {**FLOWCACHE, "clean_pass": True},
        "requests": [{"chunks": 8, "prefix": 1}],
        "every": [3],
        "kill": {"quantum": "quantum-00000006", "steps": 9},
    }
    folder, values, found, expected = together(tmp_path, {"pp": 2, "cp": 2}, values)
    assert found.quantum >= 6 and found.counts["chunks"] == found.quantum - 3
    assert len(found.shards) == 5
    got = run(tmp_path, "kept", pp=2, cp=2, **{**values, "offload": False})
    assert got["resumed"] == [found.counts["chunks"]]
    close([files(folder, 0)], expected)
    undisturbed = run(tmp_path, pp=2, cp=2, **{name: values[name] for name in ("config", "cache", "requests")})
    same([files(folder, 0)], undisturbed["latents"])


@pytest.mark.slow
def test_checkpoints_are_made_as_often_as_asked_and_counted_apart(tmp_path):
    """With two slots of one stage. Bytes and calls of items are those of a run without checkpoints."""
    folder = tmp_path / "kept"
    folder.mkdir()
    values = {"requests": [{"chunks": 6}], "every": [2], "folder": str(folder), "trace": True}
    got = run(tmp_path, "kept", cp=2, **values)
    expected, (record,) = alone(values)
    close([files(folder, 0)], expected)
    assert got["resumed"] == [0]
    made = quanta(got)
    assert all(len(names) <= 2 for names in made)
    seen = {quantum for names in made for quantum in names}
    assert seen <= {2, 4, 6, 8} and seen >= {2, 4, 6}
    items = int(record.tick_items.sum())
    lead, other = got["reports"]
    share = TOKENS // 2 * HIDDEN * 4
    assert lead.items == other.items == items
    assert other.item_bytes == items * (HEADER_BYTES + share)
    assert lead.item_bytes == (items - 5) * (HEADER_BYTES + share)  # the passes that renew a chunk give nothing back
    assert lead.velocity_bytes == 0
    assert lead.checkpoints == other.checkpoints == 4
    assert 0 < other.checkpoint_bytes < 4 * 3 * HEADER_BYTES
    assert lead.checkpoint_bytes == 0


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_gang_with_one_line(tmp_path):
    (tmp_path / "video-0").write_text("in the way")
    values = {"requests": [{"chunks": 6}], "every": [1], "folder": str(tmp_path)}
    with pytest.raises(
        GangError, match=r"^cannot write the checkpoint file .*video-0/quantum-0000000.*safetensors: "
    ) as caught:
        run(tmp_path, "kept", pp=2, **values)
    assert caught.value.failure.status == 2
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "removed"), [(0.0, False), (1.0, False), (1.0, True)])
def test_nothing_stays_of_a_cancelled_video_in_the_store_and_on_the_disk(tmp_path, seconds, removed):
    assert run(tmp_path, "cancelled", pp=2, seconds=seconds, removed=removed) == []


@pytest.mark.slow
def test_a_gate_holds_one_video_and_no_other(tmp_path):
    values = {"requests": [{"chunks": 5}, {"chunks": 4, "seed": 4}], "cache": FLOWCACHE}
    got = run(tmp_path, "gated", pp=2, **values)
    same(got["latents"], alone(values)[0])
    held, first, second = got["announced"]
    assert held == [0, 1, 2, 3]
    assert first == list(range(8)) and second == list(range(7))
    assert got["computed"] < 0.3  # of the second in which nothing could be done

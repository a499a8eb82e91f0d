"""Batch files: what a line may say, what is said of broken ones, and names that follow from what a video depends on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.batch.file import BatchItem, read_batch
from launch.options import Options
from launch.output.video import VideoWriter
from models.errors import InputError
from models.magi.weights import stage_bytes, vae_parameters
from tests.launch.output.test_video import _noise

CIRCLE = "a red circle moving right"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    return tmp_path


def base(**changes: object) -> Options:
    return replace(Options(), **changes)


def read(folder: Path, *lines: object, options: Options | None = None) -> tuple[list[BatchItem], dict[int, str]]:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return read_batch(path, options or base(), folder / "videos")


def only(folder: Path, line: object, options: Options | None = None) -> BatchItem:
    items, problems = read(folder, line, options=options)
    assert not problems, problems
    return items[0]


def clip(path: Path, height: int = 64) -> Path:
    with VideoWriter(path, fps=24) as writer:
        writer.write(_noise(8)[:, :height])
    return path


def test_a_line_says_what_the_command_line_would(folder: Path) -> None:
    clip(folder / "start.mp4")
    line = {"prompt": CIRCLE, "chunks": 3, "seed": 7, "video": "start.mp4", "priority": 2, "height": 96, "width": 32}
    item = only(folder, {**line, "steps": 8})
    request, options = item.plan.request, item.plan.options
    assert (request.prompt, request.chunks, request.seed, request.height, request.width) == (CIRCLE, 3, 7, 96, 32)
    assert (request.num_steps, options.video, item.priority) == (8, folder / "start.mp4", 2)
    assert item.plan.out == folder / "videos" / item.plan.out.name
    assert re.fullmatch(r"001-a-red-circle-moving-right-[0-9a-f]{12}\.mp4", item.plan.out.name)


def test_what_a_line_leaves_out_is_as_on_the_command_line(folder: Path) -> None:
    options = base(seed=5, seconds=2.5, steps=8, height=32)
    item = only(folder, {"prompt": CIRCLE}, options)
    request = item.plan.request
    assert (request.seed, request.num_steps, request.height, request.chunks) == (5, 8, 32, 3)
    assert only(folder, {"prompt": CIRCLE, "chunks": 1}, options).plan.request.chunks == 1  # in place of the seconds


def test_blank_lines_are_skipped_and_broken_ones_do_not_stop_the_others(folder: Path) -> None:
    (folder / "words.png").write_text("no picture")
    items, said = read(
        folder,
        {"prompt": CIRCLE},
        "",
        '{"prompt": ',
        {"prompt": CIRCLE, "lenght": 3},
        {"prompt": CIRCLE, "seed": "5"},
        {"seed": 1},
        {"prompt": CIRCLE, "image": "missing.png"},
        {"prompt": CIRCLE, "image": "words.png"},
        {"prompt": CIRCLE, "height": 33},
        {"prompt": CIRCLE, "seconds": 1, "chunks": 1},
        {"prompt": "a purple elephant"},
        '["prompt"]',
        '{"prompt": "a", "prompt": "b"}',
        {"prompt": CIRCLE, "chunks": 10**30},
        {"prompt": "a \ud800"},
        '{"prompt": "a", "seconds": NaN}',
        {"prompt": CIRCLE, "seed": True},
        "[" * 100_000,
        {"prompt": CIRCLE, "name": "Übung / 1"},
        {"prompt": CIRCLE, "\ud800\x1b": 1},
        {"prompt": CIRCLE, "image": "words.png", "video": "words.png"},
    )
    assert [item.line for item in items] == [1, 19]
    assert sorted(said) == [*range(3, 19), 20, 21]
    start = f"{folder / 'prompts.jsonl'} line"
    assert all(message.startswith(f"{start} {line}: ") and "\n" not in message for line, message in said.items())
    for line, part in {
        3: "this is not JSON: Expecting value at column",
        4: "there is no key 'lenght': known are prompt, seconds,",
        5: "seed: input should be a valid integer, not '5'",
        6: "the key 'prompt' is missing",
        7: "cannot read the image",
        9: "the height of 33 pixels is not a multiple of 16",
        10: "seconds and chunks both say how long",
        11: "purple",
        12: "no JSON object",
        13: "the key 'prompt' is there twice",
        14: "chunks: input should be less than or equal to 1000000",
        15: "unable to parse raw data as a unicode string",
        16: "seconds: input should be a finite number",
        20: "the key '\\ud800\\x1b' is no text",
        21: "image and video both say what it starts from",
    }.items():
        assert part in said[line]
    assert items[1].plan.out.name.startswith("019-übung-1-")


def test_a_line_that_fits_into_no_memory_is_refused_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("launch.model.memory.free_bytes", lambda: 10**10)
    large = {"prompt": CIRCLE, "height": 16_384, "width": 16_384}
    items, said = read(folder, {"prompt": CIRCLE}, large, options=base(launcher="ray"))
    assert [item.line for item in items] == [1]
    assert re.search(r"line 2: a video of 16384x16384 pixels .* needs \d\d\d\.\d GB, 10\.0 GB are free", said[2])
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # the ranks are elsewhere
    assert not read(folder, large, options=base(launcher="ray"))[1]


def test_not_utf8_is_said_of_the_line_alone(folder: Path) -> None:
    path = folder / "prompts.jsonl"
    good = json.dumps({"prompt": CIRCLE}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\xff\xfe\n" + good)
    items, problems = read_batch(path, base(), folder / "videos")
    assert [item.line for item in items] == [1, 3]
    assert list(problems.values()) == [f"{path} line 2: this is not UTF-8 text: save the file as UTF-8"]


def test_a_file_that_cannot_be_read_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot read the batch file .*missing.jsonl: No such file"):
        read_batch(folder / "missing.jsonl", base(), folder)
    with pytest.raises(InputError, match="no-such-model"):
        read(folder, {"prompt": CIRCLE}, options=base(model="no-such-model"))


def test_the_digest_covers_what_the_video_depends_on_and_nothing_else(folder: Path, random_weights: Path) -> None:
    clip(folder / "one.mp4")
    clip(folder / "two.mp4", height=32)
    plain = {"prompt": CIRCLE, "chunks": 2}
    first = only(folder, plain).digest
    same = [{**plain, "priority": 3}, {**plain, "name": "x"}, {**plain, "seed": 0}, {**plain, "height": 64}]
    same += [{"prompt": CIRCLE, "seconds": 2}, {**plain, "steps": None}]
    assert {only(folder, line).digest for line in same} == {first}
    layouts = base(pp=2), base(pp=2, split="2,4"), base(threads=1)  # with the same bits
    assert {only(folder, plain, options).digest for options in layouts} == {first}
    others = [{**plain, "seed": 1}, {**plain, "chunks": 3}, {**plain, "height": 32}, {**plain, "width": 32}]
    others += [{**plain, "steps": 8}, {**plain, "video": "one.mp4"}, {**plain, "video": "two.mp4"}]
    others += [{**plain, "image": "one.mp4"}, {**plain, "prompt": "a blue circle moving right"}]
    digests = [only(folder, line).digest for line in others]
    for options in (
        base(cache="none"),
        base(cache_threshold=0.5),
        base(kv_budget=2),
        base(precision="fast"),
        base(compile=True),
        base(weights=random_weights),
        base(threads=2),
        base(cp=2),
    ):
        digests.append(only(folder, plain, options).digest)
    assert len({first, *digests}) == 1 + len(digests)
    before = only(folder, {**plain, "video": "one.mp4"}).digest
    (folder / "two.mp4").replace(folder / "one.mp4")  # other content under the same name
    assert only(folder, {**plain, "video": "one.mp4"}).digest != before


def test_many_lines_build_no_model_each(folder: Path) -> None:
    read(folder, {"prompt": CIRCLE, "chunks": 2})
    before = stage_bytes.cache_info().misses, vae_parameters.cache_info().misses
    items, _ = read(folder, *({"prompt": CIRCLE, "chunks": 2, "seed": seed} for seed in range(20)))
    assert len(items) == 20
    assert (stage_bytes.cache_info().misses, vae_parameters.cache_info().misses) == before


def test_equal_lines_make_different_files_and_keep_them_when_lines_move(folder: Path) -> None:
    line, other = {"prompt": CIRCLE}, {"prompt": "a blue cross moving up"}
    items, _ = read(folder, line, line, other, line)
    assert len({item.plan.out.name for item in items}) == len({item.digest for item in items}) == 4
    again, _ = read(folder, other, "", line, line, line)
    assert {item.digest for item in again} == {item.digest for item in items}
    assert [item.digest for item in again[1:]] == [items[0].digest, items[1].digest, items[3].digest]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["prompt", "seconds", "chunks", "seed", "image", "video", "priority", "height", "steps", "name"])
NONSENSE = (
    st.binary(max_size=30)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(KEYS, JSON, max_size=3).map(lambda line: json.dumps({"prompt": CIRCLE, **line}).encode())
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nonsense=st.lists(NONSENSE.map(lambda raw: raw.replace(b"\n", b" ")), max_size=4))
def test_nonsense_never_stops_the_others(folder: Path, nonsense: list[bytes]) -> None:
    path = folder / "prompts.jsonl"
    good = json.dumps({"prompt": CIRCLE, "seed": 424242}).encode()
    path.write_bytes(b"\n".join([good, *nonsense, good]))
    items, problems = read_batch(path, base(), folder / "videos")
    assert items[0].line == 1 and items[-1].line == len(nonsense) + 2
    lines = [item.line for item in items] + [*problems]
    assert len(lines) == len(set(lines))
    assert len({item.plan.out.name for item in items}) == len(items)
    assert all("\n" not in message for message in problems.values())
    assert all(re.fullmatch(r"\d{3}-[\w-]+-[0-9a-f]{12}\.mp4", item.plan.out.name) for item in items)
    assert not list((folder / "videos").iterdir())

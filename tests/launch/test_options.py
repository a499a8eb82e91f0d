"""Options are declared once: the commands, batch lines, bounds and the arguments of ranks follow from the fields."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cli import run
from launch.option_fields import arguments, declared, from_values
from launch.options import BatchOptions, CacheName, Options, parse_size
from models.errors import InputError

BOUNDED = [one for one in declared(Options) if one.within is not None]


def test_every_option_is_in_the_help_of_its_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["generate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(one.flag in shown for one in declared(Options) if not one.argument)
    assert run(["batch", "--help"]) == 0
    shown = capsys.readouterr().out
    own = {one.name for one in declared(BatchOptions)}
    for one in (*declared(Options), *declared(BatchOptions)):
        here = (one.batch or one.name in own) and not one.argument
        assert (f" {one.flag} " in shown) == here, one.name


@pytest.mark.parametrize("one", BOUNDED, ids=lambda one: one.name)
def test_every_figure_has_its_bounds(one) -> None:
    low, high = one.within
    replace(Options(), **{one.name: one.value_type(low)})
    with pytest.raises(InputError, match=rf"{one.flag} .* cannot be used: give "):
        replace(Options(), **{one.name: low - 1})
    if high is not None:
        replace(Options(), **{one.name: one.value_type(high)})
        with pytest.raises(InputError, match=" to "):
            replace(Options(), **{one.name: high * 2})


def test_gangs_need_someone_to_work() -> None:
    with pytest.raises(InputError, match="--gangs 0 cannot be used: give 1 or more"):
        BatchOptions(file=Path("x"), gangs=0)


@given(
    chunks=st.none() | st.integers(1, 10**6),
    seed=st.integers(0, 2**63 - 1),
    threshold=st.none() | st.floats(0, 1e9),
    clean=st.none() | st.booleans(),
    prompt=st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text),
    cache=st.sampled_from(get_args(CacheName)),
)
def test_arguments_give_the_options_that_they_are_made_of(
    chunks: int | None, seed: int, threshold: float | None, clean: bool | None, prompt: str, cache: CacheName
) -> None:
    options = Options(
        prompts=[prompt], chunks=chunks, seed=seed, cache_threshold=threshold, clean_pass=clean, cache=cache, pp=2
    )
    given_again: dict[str, object] = {}
    line = arguments(options)
    rest = line.index("--")
    for word in line[:rest]:
        name, _, value = word.partition("=")
        flag = name.removeprefix("--").removeprefix("no-").replace("-", "_")
        given_again[flag] = value or not name.startswith("--no-")
    kinds = {one.name: one.value_type for one in declared(Options)}
    values = {name: kinds[name](text) if kinds[name] in (int, float) else text for name, text in given_again.items()}
    assert from_values(Options, prompts=line[rest + 1 :], **values) == options


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("512 MB", 512 * 10**6), ("1.5g", 1_500_000_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    with pytest.raises(InputError, match="is no size"):
        parse_size(text + "!")

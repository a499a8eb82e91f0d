"""Ulysses: tokens and heads over the ranks of a stage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InputError
from models.protocols import KVGeometry
from parallel.comm.messages import HEADER_BYTES
from parallel.comm.ulysses import TokenSplit, local_heads
from parallel.health.failure import GangError
from tests.parallel.on_ranks import run
from tests.parallel.ranks.test_pipeline import FLOATS, FLOWCACHE, HIDDEN, TOKENS, alone, close


@given(tokens=st.integers(1, 200), ranks=st.integers(1, 9))
def test_every_token_has_one_rank(tokens, ranks):
    split = TokenSplit(tokens, ranks)
    assert max(split.counts) - min(split.counts) <= 1
    placed = [token for part in split.slices for token in range(tokens)[part]]
    assert placed == list(range(tokens))


def test_heads_are_divided_or_refused():
    geometry = KVGeometry(
        layers=range(2), query_heads=16, key_heads=8, head_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    assert (local_heads(geometry, 4).query_heads, local_heads(geometry, 4).key_heads) == (4, 2)
    with pytest.raises(InputError, match="--cp 3 does not divide the model's 8 key heads"):
        local_heads(geometry, 3)


CASES = {
    "two slots": {},
    "uneven tokens, guided": {"requests": [{"height": 48, "width": 80}], "config": {"guided": True}},
    "two stages, compressed, reused": {"pp": 2, "budget": 2, "cache": FLOWCACHE, "trace": True},
    "two stages, compressed at random": {"pp": 2, "budget": 1, "selection": {"score": "random"}},
    "two stages, two videos, clip": {"pp": 2, "requests": [{}, {"prefix": 32, "seed": 8}], "concurrency": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_slots_make_the_same_video(tmp_path, values):
    values = dict(values)
    got = run(tmp_path, pp=values.pop("pp", 1), cp=2, **values)
    expected, records = alone(values)
    close(got["latents"], expected)
    if values.get("trace"):
        items = int(records[0].tick_items.sum())
        assert torch.equal(got["flags"][0], torch.from_numpy(records[0].flags))
        for report in got["reports"][1:]:
            received = 2 if report.rank == 2 else 1  # the tail's cp_rank 0 also takes the other's part
            assert report.items == items
            assert report.item_bytes == received * items * (HEADER_BYTES + TOKENS // 2 * HIDDEN * FLOATS)


def test_45_tokens_are_uneven():
    assert TokenSplit(6 * 3 * 5, 4).counts == [23, 23, 22, 22]


@pytest.mark.slow
def test_a_cp_that_does_not_divide_the_heads_is_one_clear_line(tmp_path):
    with pytest.raises(GangError, match="--cp 3 does not divide the model's 2 key heads"):
        run(tmp_path, cp=3)

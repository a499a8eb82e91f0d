"""Headers survive the wire."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.selection import SelectionSettings
from engine.kv.size import KVPlan
from engine.schedule import Schedule
from engine.video import KVOp, WorkItem
from models.magi.model import FixedCaptions
from models.protocols import Pass, PassCondition
from parallel.comm.messages import HEADER_BYTES, Admit, Header, Kind, pack_admit, unpack_admit

items = st.builds(
    WorkItem,
    request=st.integers(0, 1 << 20),
    tick=st.integers(-1, 1 << 20),
    chunk=st.integers(0, 1 << 20),
    step=st.none() | st.integers(0, 64),
    chunks_left=st.integers(0, 1000),
    what=st.builds(
        Pass,
        name=st.sampled_from(["denoise", "clean", "context_free"]),
        caption=st.sampled_from(["text", "null"]),
        branch=st.integers(0, 1),
        isolated=st.booleans(),
        weight=st.floats(-8, 8),
        condition=st.builds(PassCondition, t=st.floats(0, 1), distill=st.none() | st.floats(0, 16), drop=st.booleans()),
    ),
    keys_from=st.none() | st.integers(0, 1000),
    before=st.lists(
        st.builds(KVOp, kind=st.sampled_from(["enter", "retire", "publish"]), chunk=st.integers(0, 1 << 20)),
        max_size=12,
    ).map(tuple),
)
headers = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    request=st.integers(-1, 1 << 20),
    item=st.none() | items,
    flags=st.lists(st.integers(0, 2), max_size=1024).map(tuple),
    digest=st.binary(min_size=8, max_size=8),
    shape=st.lists(st.integers(1, 1 << 20), max_size=5).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)


@given(header=headers, number=st.integers(0, 1 << 40))
def test_a_header_is_read_as_it_was_written(header, number):
    buffer = torch.full((HEADER_BYTES,), 7, dtype=torch.uint8)
    header.write(buffer, number)
    read = Header.read(buffer)
    assert read.number == number
    for name in ("kind", "request", "item", "flags", "digest", "shape", "dtype"):
        assert getattr(read, name) == getattr(header, name)


def test_what_is_no_header_is_refused():
    with pytest.raises(ValueError, match="out of step"):
        Header.read(torch.zeros(HEADER_BYTES, dtype=torch.uint8))


def test_a_header_that_is_too_long_is_refused():
    header = Header(kind=Kind.ITEM, flags=(1,) * 8 * HEADER_BYTES)
    with pytest.raises(ValueError, match="does not fit"):
        header.write(torch.zeros(HEADER_BYTES, dtype=torch.uint8), 0)


def test_an_admission_survives():
    admit = Admit(
        request=4,
        schedule=Schedule(first=0, chunks=5, num_steps=8, window=4),
        kv=KVPlan(
            chunk_tokens=36,
            frame_tokens=6,
            clean_tokens=72,
            window=4,
            chunks=5,
            branches=2,
            selection=SelectionSettings(),
        ),
        captions=FixedCaptions(text=torch.randn(3, 8), null=torch.randn(2, 8)),
        grid=(6, 4, 6),
    )
    read = unpack_admit(pack_admit(admit))
    assert (read.request, read.schedule, read.kv, read.grid) == (4, admit.schedule, admit.kv, (6, 4, 6))
    assert torch.equal(read.captions.get("text", 0), admit.captions.get("text", 0))
    assert torch.equal(read.captions.get("null", 3), admit.captions.get("null", 3))

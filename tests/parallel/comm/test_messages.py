"""Headers and admissions are plain data, and are read as they were written."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.layout import KVPlan
from engine.kv.selection import SelectionSettings
from engine.request import Admission
from engine.schedule import Schedule
from engine.video import KVOp, WorkItem
from models.protocols import CaptionTable, Pass, PassCondition
from parallel.comm import messages
from parallel.comm.messages import HEADER_BYTES, Header, Kind, from_plain, pack_admit, to_plain, unpack_admit

KEY = b"of one edge of one run"

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
        condition=st.builds(
            PassCondition,
            times=st.lists(st.floats(0, 1000), min_size=1, max_size=31).map(tuple),
            distill=st.none() | st.floats(0, 16),
            drop=st.booleans(),
            fps=st.none() | st.integers(1, 60),
        ),
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
    flags=st.lists(st.integers(0, 4), max_size=1024).map(tuple),
    digest=st.binary(min_size=8, max_size=8),
    shape=st.lists(st.integers(1, 1 << 20), max_size=5).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)


@given(header=headers, number=st.integers(0, 1 << 40))
def test_a_header_is_read_as_it_was_written(header, number):
    buffer = torch.full((HEADER_BYTES,), 7, dtype=torch.uint8)
    header.write(buffer, number, KEY)
    read = Header.read(buffer, KEY)
    assert read.number == number
    for name in ("kind", "request", "item", "flags", "digest", "shape", "dtype"):
        assert getattr(read, name) == getattr(header, name)


def test_bytes_that_are_no_header_are_refused():
    with pytest.raises(ValueError, match="no header of this run"):
        Header.read(torch.zeros(HEADER_BYTES, dtype=torch.uint8), KEY)


@given(header=headers, place=st.integers(0, HEADER_BYTES - 1), change=st.integers(1, 255))
def test_a_header_of_somebody_without_the_key_is_refused(header, place, change):
    """Made with another key, or changed on the way."""
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    header.write(buffer, 3, b"of another edge")
    with pytest.raises(ValueError, match="no header of this run"):
        Header.read(buffer, KEY)
    header.write(buffer, 3, KEY)
    buffer[place] ^= change
    with pytest.raises(ValueError, match="no header of this run"):
        Header.read(buffer, KEY)


@given(data=st.data())
def test_a_damaged_header_is_a_value_error_or_another_header(data):
    """Whatever the bytes are, of a rank that has the key: nothing is executed, and no other error comes."""
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    data.draw(headers).write(buffer, 3, KEY)
    for _ in range(data.draw(st.integers(1, 8))):
        buffer[data.draw(st.integers(4, 400))] = data.draw(st.integers(0, 255))
    proof = messages._proof(KEY, buffer.numpy().tobytes()[: messages._CONTENT_BYTES])
    buffer[messages._CONTENT_BYTES :] = torch.frombuffer(bytearray(proof), dtype=torch.uint8)
    try:
        assert isinstance(Header.read(buffer, KEY), Header)
    except ValueError:
        pass


def test_a_header_that_is_too_long_is_refused():
    header = Header(kind=Kind.ITEM, flags=(1,) * 8 * HEADER_BYTES)
    with pytest.raises(ValueError, match="does not fit"):
        header.write(torch.zeros(HEADER_BYTES, dtype=torch.uint8), 0, KEY)


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.update(colour="red"),
        lambda plain: plain.pop("tick"),
        lambda plain: plain.update(tick="12"),
        lambda plain: plain.update(tick=True),
        lambda plain: plain.update(what=None),
        lambda plain: plain["what"].update(caption="subtitle"),
        lambda plain: plain["what"]["condition"].update(t=None),
        lambda plain: plain.update(before=[{"kind": "enter"}]),
        lambda plain: plain.update(before={}),
    ],
)
@given(item=items)
def test_a_field_that_is_unknown_missing_or_of_another_type_is_refused(change, item):
    plain = json.loads(to_plain(item))
    change(plain)
    with pytest.raises(ValueError):
        from_plain(WorkItem, json.dumps(plain, separators=(",", ":")).encode())


tensors = st.builds(
    lambda rows, columns, dtype: torch.randn(rows, columns).to(dtype),
    rows=st.integers(0, 5),
    columns=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
admissions = st.builds(
    Admission,
    video=st.integers(0, 1 << 20),
    schedule=st.just(Schedule(first=0, chunks=5, num_steps=8, window=4)),
    kv=st.builds(
        KVPlan,
        chunk_tokens=st.integers(1, 1 << 20),
        frame_tokens=st.integers(1, 1 << 20),
        clean_tokens=st.integers(0, 1 << 20),
        window=st.integers(1, 8),
        chunks=st.integers(1, 1 << 20),
        branches=st.integers(1, 3),
        shared=st.booleans(),
        offload=st.booleans(),
        selection=st.none() | st.builds(SelectionSettings, importance_weight=st.floats(0, 1)),
    ),
    captions=st.builds(CaptionTable, text=tensors, null=tensors, counters=st.none() | tensors, max_length=st.just(800)),
    grid=st.tuples(*[st.integers(1, 100)] * 3),
    checkpoint=st.none() | st.text(),
)


@given(admission=admissions)
def test_an_admission_is_read_as_it_was_packed(admission):
    read = unpack_admit(pack_admit(admission))
    for name in ("video", "schedule", "kv", "grid", "checkpoint"):
        assert getattr(read, name) == getattr(admission, name)
    for name in ("text", "null", "counters"):
        got, packed = getattr(read.captions, name), getattr(admission.captions, name)
        assert got is packed is None or (got.dtype == packed.dtype and torch.equal(got, packed))

"""The importance-redundancy score and the compression of buffers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.buffer import KVBuffer
from engine.kv.layout import KVPlan
from engine.kv.selection import SelectionSettings, importance, redundancy, select
from engine.video import KVOp
from models.attention import attention_backend
from models.errors import InputError
from models.protocols import KVGeometry


def test_redundancy_is_equation_11_as_written():
    torch.manual_seed(0)
    keys = torch.randn(300, 2, 16)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    similarity = torch.einsum("igd,jgd->gij", unit, unit)
    similarity.diagonal(dim1=1, dim2=2).zero_()
    assert torch.allclose(redundancy(keys), similarity.mean(1).softmax(-1), rtol=1e-5, atol=0)


def test_importance_is_the_same_in_parts(monkeypatch):
    torch.manual_seed(0)
    queries, keys = torch.randn(50, 8, 16), torch.randn(120, 2, 16)
    whole = importance(queries, keys)
    monkeypatch.setattr("engine.kv.selection._ROWS_AT_ONCE", 1)
    assert torch.allclose(importance(queries, keys), whole, rtol=1e-6)
    assert torch.allclose(whole.sum(-1), torch.ones(2))


def test_a_repeated_key_goes_first():
    """Of equal importance, what resembles the others is dropped."""
    keys = torch.eye(8)[:, None].repeat(1, 1, 1)
    keys = torch.cat([keys, keys[:1], keys[:1]])  # key 0 three times
    kept = select(
        torch.zeros(4, 1, 8), keys, keep=7, frame_tokens=1, chunk_tokens=10, settings=SelectionSettings(pool=1)
    )
    assert kept[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "values",
    [
        {"retention": "pixel"},
        {"queries": "all"},
        {"importance_weight": 1.5},
        {"pool": 4},
        {"pool": 0},
        {"query_tokens": 0},
    ],
)
def test_bad_settings_are_refused(values):
    with pytest.raises(InputError):
        SelectionSettings(**values)


FRAME, CHUNK, HEADS, SIZE = 2, 6, 2, 4


def new_buffer(budget, window, chunks, retention, branches=1, asks="last"):
    geometry = KVGeometry(
        layers=range(2), query_heads=4, key_heads=HEADS, head_size=SIZE, dtype=torch.float32, device=torch.device("cpu")
    )
    plan = KVPlan(
        chunk_tokens=CHUNK,
        frame_tokens=FRAME,
        clean_tokens=min(budget, chunks - 1) * CHUNK,
        window=window,
        chunks=chunks,
        branches=branches,
        selection=SelectionSettings(retention=retention, query_tokens=3, asks=asks),
    )
    return KVBuffer(plan, geometry, attention_backend("sdpa"))


def mark(chunk, layer):
    """Keys whose values tell chunk, token, head and layer, so that any mix-up shows."""
    tokens = torch.arange(CHUNK)[:, None, None]
    heads = torch.arange(HEADS)[None, :, None]
    base = chunk * 1000 + tokens * 10 + heads + layer / 10
    return (base + torch.zeros(CHUNK, HEADS, SIZE))[None].float()


@settings(deadline=None, max_examples=60)
@given(
    budget=st.integers(1, 3),
    window=st.integers(1, 3),
    chunks=st.integers(2, 9),
    retention=st.sampled_from(["token", "frame", "chunk"]),
    asks=st.sampled_from(["last", "next"]),
    moves=st.lists(st.booleans(), max_size=40),
)
def test_compression_keeps_whole_rows_in_order_and_never_touches_the_window(
    budget, window, chunks, retention, asks, moves
):
    """Whoever asks, and also if nobody has come to ask before the next chunk retires."""
    buffer = new_buffer(budget, window, chunks, retention, asks=asks)
    layout = buffer.layout
    bytes_at_first = buffer.nbytes
    entered = retired = 0
    for enter in moves:
        if enter and entered < chunks and entered - retired < window:
            buffer.apply(KVOp(kind="enter", chunk=entered))
            view = buffer.view(0, entered, None, asks=True)
            for layer in range(2):
                view.store(layer, mark(entered, layer), -mark(entered, layer))
                view.attend(layer, torch.randn(1, CHUNK, 4, SIZE))
            entered += 1
        elif entered > retired:
            buffer.apply(KVOp(kind="retire", chunk=retired))
            retired += 1
        assert layout.used_rows <= layout.capacity
        assert layout.clean_rows <= layout.clean_tokens
        if layout.used_rows and len(moves) % 2:
            buffer.state()  # makes what is due
        for layer in range(2):
            if buffer._branches[0][layer].due is not None:
                continue
            held = buffer._branches[0][layer].kv
            for chunk in range(retired, entered):
                rows = layout.rows(chunk)
                assert torch.equal(held[0, rows], mark(chunk, layer)[0])
                assert torch.equal(held[1, rows], -mark(chunk, layer)[0])
            clean = held[:, : layout.clean_rows]
            assert torch.equal(clean[0], -clean[1]), "keys and values were parted"
            order = clean[0, :, :, 0] if asks == "last" else clean[0, :, :, 0].sort(dim=0).values
            assert (order[1:] > order[:-1]).all(), "kept tokens are out of order"
        if buffer._branches[0][0].due is not None:
            continue
        shares = buffer.kept_shares(max(1, retired))
        assert shares.sum().item() * CHUNK == pytest.approx(layout.clean_rows)
        assert ((0 <= shares) & (shares <= 1 + 1e-6)).all()
    assert buffer.nbytes == bytes_at_first


def test_bytes_are_what_was_allocated():
    buffer = new_buffer(2, 2, 9, "token", branches=2)
    rows = 4 * CHUNK
    kv = 2 * rows * HEADS * SIZE * 4
    queries, origin = 3 * 4 * SIZE * 4, rows * HEADS * 4
    assert buffer.nbytes == 2 * 2 * (kv + queries + origin)

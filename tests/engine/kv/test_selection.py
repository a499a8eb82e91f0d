"""The importance-redundancy score and the compression of buffers."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.buffer import KVBuffer
from engine.kv.layout import KVPlan
from engine.kv.selection import Score, SelectionSettings, importance, redundancy, scores, select
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


def keep(chunks, count, *, layer=0, **values):
    """What is kept of keys of these chunks."""
    torch.manual_seed(0)
    queries, keys, owners = torch.randn(4, 2, 8), torch.randn(len(chunks), 2, 8), torch.tensor(chunks)[:, None]
    asked = {"settings": SelectionSettings(**values), "frame_tokens": 2, "chunk_tokens": len(chunks), "layer": layer}
    kept = select(queries, keys, owners.expand(-1, 2), keep=count, **asked)
    assert torch.equal(kept, kept.sort(dim=0).values), "not in order"
    return kept.T.tolist()


def test_one_half_of_the_score_can_be_left_out():
    torch.manual_seed(0)
    queries, keys = torch.randn(4, 2, 8), torch.randn(30, 2, 8)
    for score, weight in (("importance", 1.0), ("redundancy", 0.0)):
        alone = scores(queries, keys, SelectionSettings(score=score))
        assert torch.equal(alone, scores(queries, keys, SelectionSettings(importance_weight=weight)))


def test_recent_keeps_the_last_tokens_and_units():
    assert keep([0, 0, 1, 1, 2, 2], 3, score="recent") == [[3, 4, 5]] * 2
    assert keep([0, 0, 1, 1, 2, 2], 2, score="recent", retention="frame", asks="next") == [[4, 5]] * 2


def test_random_is_drawn_for_each_layer_and_chunk_and_not_of_what_is_computed():
    chunks = [0] * 30 + [1] * 30
    drawn = [keep(chunks, 20, score="random", layer=layer)[0] for layer in range(40)]
    assert keep(chunks, 20, score="random", layer=7) == [drawn[7]] * 2
    assert keep([0] * 30 + [2] * 30, 20, score="random", layer=7)[0] != drawn[7]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=60)
    assert counts.min() > 3 and counts.max() < 25, "13 is what all places have on average"


def test_even_gives_every_chunk_its_share_spread_over_it_and_the_newest_the_rest():
    three = [0] * 4 + [1] * 4 + [2] * 4
    assert keep(three, 6, score="even") == [[0, 2, 4, 6, 8, 10]] * 2
    assert keep(three, 8, score="even") == [[0, 2, 4, 5, 6, 8, 9, 10]] * 2
    assert keep(three, 2, score="even") == [[4, 8]] * 2
    assert keep(three, 6, score="even", retention="frame", asks="next") == [[0, 1, 4, 5, 8, 9]] * 2
    assert keep([0, 3, 3, 3, 3, 3, 3], 4, score="even") == [[0, 1, 3, 5]] * 2


@pytest.mark.parametrize(
    "values",
    [
        {"score": "best"},
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


def new_buffer(budget, window, chunks, retention, branches=1, asks="last", score="flowcache"):
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
        selection=SelectionSettings(score=score, retention=retention, query_tokens=3, asks=asks),
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
    score=st.sampled_from(get_args(Score)),
    moves=st.lists(st.booleans(), max_size=40),
)
def test_compression_keeps_whole_rows_in_order_and_never_touches_the_window(
    budget, window, chunks, retention, asks, score, moves
):
    """Whoever asks, and also if nobody has come to ask before the next chunk retires."""
    buffer = new_buffer(budget, window, chunks, retention, asks=asks, score=score)
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
            if buffer._layers[0, layer].due is not None:
                continue
            held = buffer._layers[0, layer].kv
            for chunk in range(retired, entered):
                rows = layout.rows(chunk)
                assert torch.equal(held[0, rows], mark(chunk, layer)[0])
                assert torch.equal(held[1, rows], -mark(chunk, layer)[0])
            clean = held[:, : layout.clean_rows]
            assert torch.equal(clean[0], -clean[1]), "keys and values were parted"
            order = clean[0, :, :, 0] if asks == "last" else clean[0, :, :, 0].sort(dim=0).values
            assert (order[1:] > order[:-1]).all(), "kept tokens are out of order"
        if buffer._layers[0, 0].due is not None:
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

"""Messages become bytes and come back the same; nothing else comes back."""

import json
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint.files import CheckpointConfig
from engine.progress import Progress
from engine.request import Request
from parallel.cluster.messages import (
    _KINDS,
    Admitted,
    ChunkMade,
    GangReady,
    MessageError,
    Progressed,
    QuantumReady,
    VideoOrder,
    decode,
    encode,
    log_entry,
)
from tests.parallel.cluster.simulation import size


def back(message):
    text, arrays = encode(message)
    return decode(text, iter([array.tobytes() for array in arrays]).__next__)


def envelope(plain, arrays=0):
    return json.dumps({"message": plain, "arrays": arrays}).encode()


def test_an_order_comes_back_the_same():
    frames = torch.arange(4 * 16 * 16 * 3, dtype=torch.uint8).reshape(4, 16, 16, 3)
    request = Request(prompt="größer", chunks=2, height=16, width=16, num_steps=4, seed=2**62, prefix=frames)
    order = VideoOrder(
        video="a", request=request, size=size(), checkpoint=CheckpointConfig(folder=Path("/x/y"), every=3), stored=1
    )
    made = back(order)
    assert torch.equal(made.request.prefix, frames) and made.request.seed == 2**62
    assert (made.size, made.checkpoint, made.stored, made.priority) == (order.size, order.checkpoint, 1, 0)
    assert made.request.prompt == "größer"


def test_events_come_back_the_same():
    values = {field.name: number for number, field in enumerate(fields(Progress))}
    events = [
        GangReady(),
        Admitted(video="a", number=3, first=1),
        QuantumReady(video="a", quantum=2),
        Progressed(video="a", progress=Progress(**{**values, "computed_fraction": 1 / 3, "kv_bytes": 2**40})),
    ]
    assert back(events) == tuple(events)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_arrays_come_back_the_same_and_contiguous_ones_are_not_copied(shape):
    latents = np.full(shape, 1.5, np.float32)
    frames = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1)
    text, arrays = encode(ChunkMade(video="a", index=0, frames=frames, latents=latents))
    made = decode(text, iter([array.tobytes() for array in arrays]).__next__)
    assert np.array_equal(made.frames, frames) and made.latents.shape == shape and np.array_equal(made.latents, latents)
    if shape:
        assert arrays[1] is latents
    assert made.frames.base is not None  # it is what was received, not a copy


def test_every_field_of_every_kind_is_needed_or_has_a_default_and_no_other_is_taken():
    assert {"VideoOrder", "ChunkMade", "Progress"} <= _KINDS.keys()
    plain = json.loads(encode(Admitted(video="a", number=3, first=1))[0])["message"]
    for change in ({"other": 1}, {"gang": "g", "more": None}):
        with pytest.raises(MessageError):
            decode(envelope({**plain, "fields": {**plain["fields"], **change}}), bytes)
    del plain["fields"]["number"]
    with pytest.raises(MessageError):
        decode(envelope(plain), bytes)


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"kind": "os.system"},
        {"kind": "os.system", "fields": {}},
        {"kind": ["Finish"], "fields": {}},
        {"kind": "Finish", "fields": []},
        {"kind": "Finish"},
        {"kind": "path"},
        {"kind": "array", "number": 0, "dtype": "|O", "shape": [1]},
        {"kind": "array", "number": 1, "dtype": "<f4", "shape": [2]},
        {"kind": "array", "number": 0, "dtype": "<f4", "shape": [99]},
        {"kind": "CheckpointConfig", "fields": {"folder": {"kind": "path", "path": "x"}, "every": 0}},
    ],
)
def test_another_kind_is_an_error(plain):
    with pytest.raises(MessageError):
        decode(envelope(plain, 1), lambda: bytes(8))


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"{}", b'{"message": 1, "arrays": "x"}', b"[" * 100_000, pickle.dumps(GangReady())]
)
def test_what_is_no_json_of_a_message_is_an_error(text):
    with pytest.raises(MessageError):
        decode(text, bytes)


def test_what_is_no_message_cannot_be_sent():
    for one in (object(), {"a": 1}, GangReady, 1j, RuntimeError("x")):
        with pytest.raises(MessageError):
            encode(one)


def test_the_log_has_neither_frames_nor_latents():
    array = np.zeros(3)
    entry = log_entry(ChunkMade(video="a", index=2, frames=array, latents=array), 1.5)
    assert entry == {"seconds": 1.5, "event": "ChunkMade", "gang": "", "video": "a", "index": 2}

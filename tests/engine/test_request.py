"""Requests check themselves."""

import pytest
import torch

from engine.request import Request
from models.errors import InputError

GOOD = {"prompt": "a red circle", "chunks": 2, "height": 64, "width": 64, "num_steps": 16, "seed": 0}


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("prompt", "  ", "prompt"),
        ("chunks", 0, "chunks"),
        ("chunks", -1, "chunks"),
        ("height", 72, "16"),
        ("width", 0, "16"),
        ("num_steps", 0, "steps"),
        ("seed", -1, "seed"),
    ],
)
def test_bad_values_are_named(key, value, word):
    with pytest.raises(InputError, match=word):
        Request(**{**GOOD, key: value})


def test_a_prefix_must_have_the_size_of_the_video():
    with pytest.raises(InputError, match="32x64"):
        Request(**GOOD, prefix=torch.zeros(1, 64, 32, 3, dtype=torch.uint8))


@pytest.mark.parametrize("frames", [torch.zeros(1, 64, 64, 3), torch.zeros(64, 64, 3, dtype=torch.uint8)])
def test_a_prefix_must_be_uint8_frames(frames):
    with pytest.raises(InputError, match="uint8"):
        Request(**GOOD, prefix=frames)


def test_an_empty_prefix_is_refused():
    with pytest.raises(InputError, match="at least one"):
        Request(**GOOD, prefix=torch.zeros(0, 64, 64, 3, dtype=torch.uint8))

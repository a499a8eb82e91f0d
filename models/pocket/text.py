"""The text encoder of magi-pocket: a fixed word vocabulary in place of T5.

It knows words and vectors. A word is a one-hot vector; the DiT's own caption projection learns the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.pocket.words import VOCABULARY, parse_prompt

CAPTION_CHANNELS = 32
_LENGTH = 7  # "a red circle moving right with rests"
_SCALE = 4.0


def encode_prompt(prompt: str) -> Tensor:
    """Embed a prompt, in its canonical wording and padded to the longest one.

    Returns:
        [7, 32] fp32.

    An `InputError` if the prompt has an unknown word, or no or two colours, shapes or motions.
    """
    words = parse_prompt(prompt).prompt.split()
    words += ["<pad>"] * (_LENGTH - len(words))
    indices = torch.tensor([VOCABULARY.index(word) for word in words])
    return _SCALE * torch.nn.functional.one_hot(indices, CAPTION_CHANNELS).float()


class PocketEncoder:
    """`encode_prompt` in the place of a text encoder."""

    encode = staticmethod(encode_prompt)

"""The text of magi-pocket: the words that it knows, what a prompt asks for, and an encoder in place of T5's.

A word is a one-hot vector; the DiT's own caption projection learns the rest. `clips.py` turns words into pixels.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import InputError

CAPTION_CHANNELS = 32
_SCALE = 4.0

# sRGB, 0..1
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.13, 0.13),
    "green": (0.12, 0.74, 0.20),
    "blue": (0.15, 0.25, 0.92),
    "yellow": (0.93, 0.86, 0.14),
    "cyan": (0.12, 0.82, 0.86),
    "magenta": (0.86, 0.16, 0.80),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Direction on the screen, x to the right and y down.
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
_FILLERS = ("a", "moving", "standing")
VOCABULARY = ("<pad>", *_FILLERS, *COLOURS, *SHAPES, *MOTIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What a prompt asks for."""

    colour: str
    shape: str
    motion: str

    def __post_init__(self) -> None:
        for value, known in ((self.colour, COLOURS), (self.shape, SHAPES), (self.motion, MOTIONS)):
            if value not in known:
                raise InputError(f"unknown word {value!r}: known are {', '.join(known)}")

    @property
    def prompt(self) -> str:
        """The scene as a prompt."""
        verb = "standing still" if self.motion == "still" else f"moving {self.motion}"
        return f"a {self.colour} {self.shape} {verb}"


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt of the form "a red circle moving right" or "a blue cross standing still".

    Raises:
        InputError: a word is unknown, or colour, shape or motion is missing or given twice.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    if not words:
        raise InputError('the prompt is empty: try "a red circle moving right"')
    for word in words:
        if word not in VOCABULARY:
            close = difflib.get_close_matches(word, VOCABULARY[1:], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            known_words = ", ".join(VOCABULARY[1:])
            raise InputError(f"unknown word {word!r} in the prompt{hint}: magi-pocket knows {known_words}")
    found = {}
    for name, known in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS)):
        given = [word for word in words if word in known]
        if len(given) != 1:
            problem = "names no" if not given else "names more than one"
            raise InputError(f"the prompt {problem} {name}: give one of {', '.join(known)}")
        found[name] = given[0]
    return Scene(**found)


def encode_prompt(prompt: str) -> Tensor:
    """Embed a prompt in its canonical wording, of five words: [5, 32] fp32; errors as in `parse_prompt`."""
    indices = torch.tensor([VOCABULARY.index(word) for word in parse_prompt(prompt).prompt.split()])
    return _SCALE * torch.nn.functional.one_hot(indices, CAPTION_CHANNELS).float()


class PocketEncoder:
    """`encode_prompt` in the place of a text encoder."""

    def encode(self, prompt: str) -> Tensor:
        """Encode one prompt; shape and errors as in `encode_prompt`."""
        return encode_prompt(prompt)

"""The words that magi-pocket knows, and what they mean to the clips it is trained on.

It knows no tensors and no model: `text.py` turns words into embeddings, `clips.py` into pixels.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import InputError

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
PANS = ("left", "right")  # where a camera turns; what it sees moves the other way
# Pixels per frame. At each of them a turn of a panorama (256 pixels) is a whole number of latent frames.
SPEEDS: dict[str, float] = {"": 1.0, "slowly": 0.8, "fast": 1.6}
RESTS = "with rests"
"""A pace: at the usual speed, and every now and then it stands still for a while."""
PACES = (*SPEEDS, RESTS)
_FILLERS = ("a", "moving", "standing", "panning")
VOCABULARY = ("<pad>", *_FILLERS, *COLOURS, *SHAPES, *MOTIONS, *PACES[1:-1], *RESTS.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One object over a grey background."""

    colour: str
    shape: str
    motion: str
    pace: str = ""

    def __post_init__(self) -> None:
        for value, known in ((self.colour, COLOURS), (self.shape, SHAPES), (self.motion, MOTIONS), (self.pace, PACES)):
            if value not in known:
                raise InputError(f"unknown word {value!r}: known are {', '.join(known)}")
        if self.pace and self.motion == "still":
            raise InputError(f"what stands still has no pace: leave out {self.pace!r}")

    @property
    def prompt(self) -> str:
        """The scene as a prompt."""
        verb = "standing still" if self.motion == "still" else f"moving {self.motion}"
        return f"a {self.colour} {self.shape} {verb} {self.pace}".strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Panorama:
    """A camera that turns in a world of landmarks, which closes on itself after 256 pixels."""

    motion: str
    pace: str = ""

    def __post_init__(self) -> None:
        for value, known in ((self.motion, PANS), (self.pace, SPEEDS)):
            if value not in known:
                raise InputError(f"a camera cannot pan {value!r}: known are {', '.join(filter(None, known))}")

    @property
    def prompt(self) -> str:
        """The panorama as a prompt."""
        return f"panning {self.motion} {self.pace}".strip()


def parse_prompt(prompt: str) -> Scene | Panorama:
    """Read "a red circle moving right", "a blue cross standing still", or "panning left".

    A pace may follow: "slowly", "fast", and for an object "with rests".

    An `InputError` if a word is unknown, or colour, shape or motion is missing or given twice.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    if not words:
        raise InputError('the prompt is empty: try "a red circle moving right"')
    for word in words:
        if word not in VOCABULARY[1:]:
            close = difflib.get_close_matches(word, VOCABULARY[1:], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            known_words = ", ".join(VOCABULARY[1:])
            raise InputError(f"unknown word {word!r} in the prompt{hint}: magi-pocket knows {known_words}")
    paces = _said(words, ("slowly", "fast", "rests"))
    if len(paces) > 1:
        raise InputError(f"the prompt names more than one pace: {', '.join(paces)}")
    pace = paces[0] if paces else ""
    pace = RESTS if pace == "rests" else pace
    if "panning" in words:
        if extra := _said(words, (*COLOURS, *SHAPES)):
            raise InputError(f"a panorama has landmarks of its own: leave out {', '.join(extra)}")
        return Panorama(motion=_one(words, "motion", PANS), pace=pace)
    colour, shape = _one(words, "colour", tuple(COLOURS)), _one(words, "shape", SHAPES)
    return Scene(colour=colour, shape=shape, motion=_one(words, "motion", tuple(MOTIONS)), pace=pace)


def _said(words: Sequence[str], known: Sequence[str]) -> list[str]:
    return [word for word in words if word in known]


def _one(words: Sequence[str], name: str, known: Sequence[str]) -> str:
    given = _said(words, known)
    if len(given) != 1:
        problem = "names no" if not given else "names more than one"
        raise InputError(f"the prompt {problem} {name}: give one of {', '.join(known)}")
    return given[0]

"""Which prompts a benchmark of magi-pocket asks for: as even over the words as their number allows, and repeatable."""

from __future__ import annotations

import math
import random

from models.pocket.words import COLOURS, MOTIONS, SHAPES, Scene


def balanced_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes in which every colour, shape and motion comes up equally often, to within one.

    The words are shuffled, then each kind is gone through in turn. As 6 colours, 4 shapes and 5 motions repeat together
    only after 60 scenes, the first 60 are all different, and they have each colour with each motion twice, and each
    shape with each motion three times. The next 60 are the other half of the 120 scenes.
    """
    rng = random.Random(seed)
    colours, shapes, motions = (rng.sample(list(words), len(words)) for words in (COLOURS, SHAPES, MOTIONS))
    cycle = math.lcm(len(colours), len(shapes), len(motions))
    return [
        Scene(
            colour=colours[i % len(colours)],
            shape=shapes[(i + i // cycle) % len(shapes)],
            motion=motions[i % len(motions)],
        )
        for i in range(count)
    ]

"""Several videos of one command: a plan for each, with names and seeds that follow from the order of the prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.output.files import check_folder
from launch.plan import Options, Plan, check_prompt, plan_video
from models.errors import InputError

_LETTERS = 40  # of a prompt in a name; file systems take 255 bytes


def video_names(prompts: Sequence[str]) -> list[str]:
    """Names without endings, such as `00-a-red-circle`: the place, and the prompt's letters and digits."""
    digits = max(2, len(str(len(prompts) - 1)))
    names = []
    for place, prompt in enumerate(prompts):
        words = re.sub(r"[\W_]+", "-", prompt.lower())[:_LETTERS].strip("-")
        names.append(f"{place:0{digits}}-{words}" if words else f"{place:0{digits}}")
    return names


def plan_videos(options: Options, prompts: Sequence[str]) -> list[Plan]:
    """A plan for each prompt; one prompt's is that of `plan_video`.

    Of several, the n-th video has the seed plus n, a file in the folder `options.out`, and a record in a sub-folder of
    its own; what it starts from, if anything, is the same for all.

    Raises:
        InputError: something cannot be used.
    """
    if len(prompts) == 1:
        return [plan_video(replace(options, prompt=prompts[0]))]
    folder = options.out
    if folder.suffix.lower() == ".mp4":
        raise InputError(f"--out {folder} names one video, but there are {len(prompts)} prompts: give a folder")
    check_folder(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write {folder}: it is not a folder")
    names = video_names(prompts)
    outs = [folder / f"{name}.mp4" for name in names]
    if taken := next((path for path in outs if path.exists() and not path.is_file()), None):
        raise InputError(f"cannot write {taken}: there is something of that name that is not a file")
    # The folder is made when there is a model, so it may be missing here; the name of the first stands for all checks.
    first = plan_video(replace(options, prompt=prompts[0], out=_near(folder) / outs[0].name))
    plans = []
    for place, (prompt, name, out) in enumerate(zip(prompts, names, outs, strict=True)):
        check_prompt(first.config, prompt)
        request = replace(first.request, prompt=prompt, seed=options.seed + place)
        record = None if options.record is None else options.record / name
        plans.append(replace(first, request=request, out=out, record=record))
    return plans


def _near(folder: Path) -> Path:
    """The folder, or the one above it that is there already."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())

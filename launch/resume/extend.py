"""Making a finished video longer, from the state that `--keep-state` has left: `flowcache continue`.

The longer video is asked for as a whole: with the length of both, and with a new prompt from the old end on. It is
given the chunks and the checkpoint of the shorter one up to where nothing depended on its end. What follows is made
anew, so that it is bit for bit what it would have been if all of it had been asked for at once.
"""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from engine.files import link_file, part_of, write_errors
from launch.generate import generate
from launch.option_fields import arguments, from_values
from launch.options import ContinueOptions, Options
from launch.output.names import STREAM
from launch.plan import Plan, plan_videos
from launch.resume.saved import DIGEST_LENGTH, MANIFEST, saved_folder
from models.errors import InputError
from parallel.ranks.environment import RankEnv


def extend(given: ContinueOptions) -> str | None:
    """Make a video longer; returns what `generate` does. An `InputError` says what is missing, or cannot be used."""
    if RankEnv.from_environment() is not None:
        raise InputError("continue starts the ranks that the video was made with itself: leave torchrun out")
    state = find_state(given.what)
    before = _read(state)
    (old,) = plan_videos(replace(before, out=given.out or before.out))
    if saved_folder(replace(old, options=replace(old.options, checkpoint=state.parent))) != state:
        raise InputError(
            f"{state} was made of other files or settings than there are now, such as another --image or weights: "
            "make the video anew"
        )
    options = _longer(old, given, state.parent if given.out == str(STREAM) else old.out.with_suffix(".state"))
    (new,) = plan_videos(options)
    folder = saved_folder(new)
    assert folder is not None
    if not folder.exists():
        _copy(state, folder)
    text = generate(options, ["generate", *arguments(options)])
    if given.out is None:
        shutil.rmtree(state, ignore_errors=True)  # of a video that is not there any more
        with suppress(OSError):
            state.parent.rmdir()
    return text


def find_state(what: Path) -> Path:
    """The folder of a video's state, given the video or the folder, or one in which it is the only one."""
    places = [what, *what.glob("*")] if what.is_dir() else [*what.with_suffix(".state").glob("*")]
    digest = what.stem[-DIGEST_LENGTH:]  # as a batch has it in the names of its videos
    places += [] if what.is_dir() else [what.parent / ".checkpoints" / digest]
    found = [place for place in places if (place / MANIFEST).is_file()]
    if not found:
        raise InputError(
            f"there is no state of {what}: make it with --keep-state, and with --checkpoint DIR name that folder here"
        )
    if len(found) > 1:
        names = ", ".join(str(place) for place in sorted(found))
        raise InputError(f"{what} holds the states of several videos: name one of {names}")
    return found[0].absolute()


def _read(state: Path) -> Options:
    path = state / MANIFEST
    try:
        return from_values(Options, **json.loads(path.read_text())["options"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _longer(old: Plan, given: ContinueOptions, root: Path) -> Options:
    """The options that make the longer video as a whole."""
    known, schedule = old.model.config.figures, old.size.schedule
    chunk = known.chunk_frames / known.fps
    more = max(1, -(-round(given.seconds * 1000) // round(chunk * 1000)))
    prompts = list(old.options.prompt_at or ())
    if given.prompt is not None:
        prompts.append(f"{(schedule.chunks - schedule.first) * chunk:.6f}s {given.prompt}")
    return replace(
        old.options,
        chunks=old.request.chunks + more,
        prompt_at=prompts or None,
        checkpoint=root,
        keep_state=given.out != str(STREAM),
        keep_partial=given.keep_partial,
        preview=given.preview,
    )


def _copy(state: Path, folder: Path) -> None:
    """Give the longer video what the shorter one has left, which stays. Files are never written into, so links do."""
    part = part_of(folder)
    with write_errors(folder):
        try:
            part.parent.mkdir(exist_ok=True)
            shutil.copytree(state, part, copy_function=link_file, ignore=shutil.ignore_patterns(MANIFEST))
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

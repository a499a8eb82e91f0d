"""From options to plans: everything that can be checked is checked here, before a weight is read.

Which model is meant is settled in `launch/model/resolve.py`; how a video is denoised is the engine's business. What
cannot be used is an `InputError` with one line that says what to do.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from engine.files import check_folder, check_target, partial_of
from engine.request import Request
from launch.model.memory import Job
from launch.model.resolve import ModelPlan, layout_of, plan_model
from launch.options import Options, ray_address, together
from launch.output.names import STREAM, SUFFIXES, suffix_of
from models.config import read_json
from models.errors import InputError
from models.families import family_of
from models.family import Figures
from parallel.cluster.config import video_size
from parallel.cluster.messages import VideoOrder
from parallel.cluster.scheduler import VideoSize

if TYPE_CHECKING:
    from launch.media import Bounds

_LETTERS = 40  # of a prompt in a name; file systems take 255 bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One video, checked: what to load, what to make, and where to put it."""

    options: Options  # that it was made of
    model: ModelPlan
    request: Request
    out: Path  # file to write
    record: Path | None  # folder for a record of the run; None for none
    suffix: str = ".mp4"  # says what the file is; as of `suffix_of`

    @property
    def size(self) -> VideoSize:
        """What it takes of its ranks; an `InputError` says why the model cannot make it."""
        model, layout, split = self.model, layout_of(self.options), self.options.split
        return video_size(model.config, self.request, reuse=model.reuse, kv=model.kv, layout=layout, split=split)

    def order(self, video: str) -> VideoOrder:
        """The order to make it, under a name."""
        model = self.model
        return VideoOrder(video=video, request=self.request, size=self.size, reuse=model.reuse, kv=model.kv)


def plan_videos(options: Options) -> list[Plan]:
    """A plan for each prompt. No weights are read.

    One prompt's video goes to the file `out`. Of several, the n-th has the seed plus n, a file in the folder `out`, and
    a record in a sub-folder of its own; what it starts from, if anything, is the same for all.
    """
    prompts = options.prompts
    if options.record is not None:
        check_folder(options.record)
    _check_saving(options)
    if options.trace is not None:
        check_target(options.trace, suffix=".json", what="trace")
    if len(prompts) == 1:
        return [_plan_one(options, options.out or "video.mp4")]
    folder, names = Path(options.out or "videos"), video_names(prompts)
    if folder == STREAM or folder.suffix.lower() in SUFFIXES:
        raise InputError(f"--out {folder} names one video, but there are {len(prompts)} prompts: give a folder")
    check_folder(folder)
    outs = [folder / f"{name}.mp4" for name in names]
    if taken := next((path for path in outs if path.exists() and not path.is_file()), None):
        raise InputError(f"cannot write {taken}: there is something of that name that is not a file")
    plans = plan_requests(options, outs)
    if options.record is None:
        return plans
    return [replace(plan, record=options.record / name) for plan, name in zip(plans, names, strict=True)]


def _check_saving(options: Options) -> None:
    """See that a video can be kept as it is made, if that is asked for."""
    if options.checkpoint is None and not options.keep_state:
        return
    if not options.checkpoint_every:
        raise InputError("--checkpoint-every 0 keeps nothing: give 1 or more, or leave out --checkpoint")
    if options.record is not None:
        raise InputError("--record is of a whole run, and one with --checkpoint may go on later: leave out one of them")
    if options.checkpoint is not None:
        check_folder(options.checkpoint)
    elif options.out == str(STREAM):
        raise InputError("--keep-state has no place beside standard output: give --checkpoint DIR")


def _plan_one(options: Options, name: str) -> Plan:
    """The plan of a single video; what its name asks for, and where that is, is checked."""
    out, suffix = Path(name), suffix_of(str(name))
    if out == STREAM:
        if options.preview or os.isatty(1):
            why = "there is no name for a --preview" if options.preview else "send it into a file or a program"
            raise InputError(f"--out - writes the video to standard output: {why}")
    elif suffix:
        for path, what in ((out, "video"), (partial_of(out), "unfinished video")):
            check_target(path, suffix=None, what=what)
    else:
        check_folder(out)
        if out.exists() and any(out.iterdir()):
            raise InputError(f"cannot write {out}: the folder is not empty; name another one, or empty it")
    if options.preview:
        check_target(preview := out.with_suffix(".png"), suffix=None, what="preview")
        if options.image is not None and options.image.absolute() == preview.absolute():
            raise InputError(f"--preview would take the place of --image {options.image}: name another --out")
    return replace(plan_requests(options, [out])[0], suffix=suffix)


def plan_requests(options: Options, outs: Sequence[Path]) -> list[Plan]:
    """A plan for each prompt, with the seeds of several; `outs` are their files, which are not looked at."""
    if not options.prompts:
        raise InputError("there is no prompt: say what the video shows")
    first = plan_video(options, out=outs[0], at_a_time=together(options, len(options.prompts)))
    known = [*options.prompts, *(prompt for _, prompt in first.request.script), options.negative_prompt]
    loader = first.model.source.loader.with_prompts(tuple(filter(None, known)))
    first = replace(first, model=replace(first.model, source=replace(first.model.source, loader=loader)))
    plans = []
    for place, (prompt, out) in enumerate(zip(options.prompts, outs, strict=True)):
        family_of(first.model.config).check_prompt(first.model.config, prompt)
        request = replace(first.request, prompt=prompt, seed=options.seed + place)
        plans.append(replace(first, request=request, out=out))
    return plans


def plan_video(
    options: Options, *, out: Path, at_a_time: int = 1, bounds: Bounds | None = None, starts: bool = True
) -> Plan:
    """Check the options of one video, of the first prompt, and read the picture or the clip that it starts from.

    That is read within `bounds`, if it may come from anybody; without `starts` it may still come. There must be memory
    for `at_a_time` such videos. The file `out` is not looked at.
    """
    if options.image is not None and options.video is not None:
        raise InputError("--image and --video both say what to start from: give one of them")
    model = plan_model(options)
    config, known = model.config, model.config.figures
    if known.sees_image and options.image is None and starts:
        raise InputError(f"{model.name} makes a video of an image: give it with --image")
    if options.end_image is not None and not known.ends:
        raise InputError(f"{model.name} cannot be told of its end so: leave out --end-image, or see --sampling")
    request = Request(
        prompt=options.prompts[0],
        script=_script(options, known),
        chunks=_chunks(options, known),
        height=options.height or known.height,
        width=options.width or known.width,
        num_steps=options.steps or known.num_steps,
        seed=options.seed,
        fps=options.fps,
        negative=options.negative_prompt,
    )
    if options.negative_prompt:
        family_of(config).check_negative(config)
    for prompt in (request.prompt, *(prompt for _, prompt in request.script)):
        family_of(config).check_prompt(config, prompt)
    started = options.image is not None or options.video is not None  # which may fill a chunk that is not counted
    if request.script and request.script[-1][0] >= request.chunks + started:
        prompt = request.script[-1][1]
        raise InputError(f"the prompt {prompt!r} begins after the end of the video: ask for more --seconds")
    plan = Plan(options=options, model=model, request=request, out=out, record=options.record)
    if known.boundless and model.kv.budget is None:
        raise InputError(
            f"{model.name} looks back at the whole video (noise2clean_kvrange is empty), so that {request.chunks:,} "
            f"chunks hold {plan.size.kv_bytes / 1e9:,.1f} GB of keys and values: give --kv-budget CHUNKS"
        )
    if options.launcher != "ray" or (model.device == "cpu" and not ray_address()):  # whose ranks may be anywhere
        job(plan, at_a_time).check(model.device)
    prefix, end = _given_frames(options, request, known.fps, bounds)
    return replace(plan, request=replace(request, prefix=prefix, end=end))


def job(plan: Plan, videos: int = 1) -> Job:
    """What takes memory when so many such videos are made at a time."""
    model, options = plan.model, plan.options
    return Job(
        config=model.config,
        vae_bytes=model.vae_bytes,
        request=plan.request,
        reuse=model.reuse,
        kv=model.kv,
        layout=layout_of(options),
        split=options.split,
        videos=videos,
    )


def slug(text: str) -> str:
    """A text as part of a file name: its small letters and digits, with dashes between them; may be empty."""
    return re.sub(r"[\W_]+", "-", text.lower())[:_LETTERS].strip("-")


def video_names(prompts: Sequence[str]) -> list[str]:
    """Names without endings, such as `00-a-red-circle`: the place, and the prompt's letters and digits."""
    digits = max(2, len(str(len(prompts) - 1)))
    names = []
    for place, prompt in enumerate(prompts):
        words = slug(prompt)
        names.append(f"{place:0{digits}}-{words}" if words else f"{place:0{digits}}")
    return names


def _script(options: Options, known: Figures) -> tuple[tuple[int, str], ...]:
    """Prompts of later chunks, of `--prompts` and `--prompt-at`, by the first chunk that is made of each."""
    given: list[tuple[str, str]] = []
    if options.script is not None:
        values = read_json(options.script, "the prompts")
        if not all(isinstance(prompt, str) for prompt in values.values()):
            raise InputError(f'{options.script}: write times and prompts, such as {{"4s": "a red circle moving left"}}')
        given += values.items()
    given += [(time, prompt) for time, _, prompt in (text.partition(" ") for text in options.prompt_at or ())]
    chunk_frames = known.chunk_frames
    script: dict[int, str] = {}
    for time, prompt in given:
        found = re.fullmatch(r"(\d{1,7}(?:\.\d+)?)s?", time.strip())
        if found is None:
            raise InputError(f"{time!r} is no time: write seconds, such as 4s")
        chunk = int(round(float(found[1]) * known.fps, 3) // chunk_frames)
        if not prompt.strip():
            raise InputError(f"there is no prompt for {time}")
        if not chunk:
            seconds = chunk_frames / known.fps
            raise InputError(f"{time} is in the first chunk of {seconds:g} s, which PROMPT is for: give a later time")
        if chunk in script:
            raise InputError(f"there are two prompts for the chunk at {time}: leave out one")
        script[chunk] = prompt
    return tuple(sorted(script.items()))


def _chunks(options: Options, known: Figures) -> int:
    """Length in chunks; seconds are rounded up, as the released code rounds frames (specification 7.1)."""
    if options.seconds is not None and options.chunks is not None:
        raise InputError("--seconds and --chunks both say how long the video is: give one of them")
    if options.chunks is not None:
        return options.chunks
    if options.seconds is None:
        return math.ceil(known.frames / known.chunk_frames)
    # To a thousandth of a frame, so that 2.1 s at 10 frames per second is 21 frames and not a hair more.
    return math.ceil(round(options.seconds * known.fps, 3) / known.chunk_frames)


def _given_frames(
    options: Options, request: Request, fps: int, bounds: Bounds | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the video begins with and what it ends with, as far as that is given."""
    prefix = end = None
    if options.image or options.video or options.end_image:
        from launch.media import Frame, read_image, read_video  # it needs PyAV

        frame = Frame(height=request.height, width=request.width, fit=options.fit, bounds=bounds)
        if options.image is not None:
            prefix = read_image(options.image, frame)
        elif options.video is not None:
            prefix = read_video(options.video, frame, fps=fps, end=options.video_from)
        if options.end_image is not None:
            end = read_image(options.end_image, frame)
    return prefix, end

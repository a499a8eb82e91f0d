"""The options of the commands: each is declared once, with its type, default, bounds and the help that teaches it.

The command line, a line of a batch file and the checks are made from these fields (`launch/option_fields.py`). What an
option does is decided where it is used, and nothing heavy is imported here, so that help is there at once.
"""

import os
import re
from dataclasses import MISSING, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from launch.option_fields import Opt, check_bounds, option
from models.errors import InputError

_video, _start = partial(option, "The video"), partial(option, "Start from something")
_reuse, _passes, _memory = partial(option, "Reuse"), partial(option, "Extra passes"), partial(option, "Memory")
_record, _ranks = partial(option, "Record"), partial(option, "Ranks")
_text = partial(option, "Text and guidance")
_files, _compute = partial(option, "Model files"), partial(option, "How to compute")
_gangs, _safety = partial(option, "Gangs"), partial(option, "When something goes wrong")
TRACE_FILE = "trace.json"  # in the folder of a record


Fit = Literal["stretch", "crop", "pad"]
ClipEnd = Literal["start", "end"]
CacheName = Literal["none", "teacache", "flowcache-slow", "flowcache-fast"]
ReuseKind = Literal["residual", "velocity", "extrapolate"]
Arithmetic = Literal["fp32", "bf16"]
TokenUnit = Literal["token", "frame", "chunk"]
TokenScore = Literal["flowcache", "importance", "redundancy", "recent", "random", "even"]

_PROMPTS = Opt(
    'What the video shows. magi-pocket knows a colour, a shape and a motion, "a red circle moving right", and a camera '
    'that turns, "panning right". Several prompts make several videos.',
    metavar="PROMPT...",
    argument=True,
    batch=False,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What was given to `flowcache generate`; None where nothing was. An `InputError` if a figure is out of bounds."""

    prompts: list[str] = field(default_factory=list, metadata={"option": _PROMPTS})

    model: str | None = _video("A name from [cyan]flowcache models[/cyan].", shown="magi-pocket")
    seconds: float | None = _video("Length, rounded up to whole chunks of one second.", within=(0.001, 1e6), line=True)
    chunks: int | None = _video(
        "Length in chunks of 24 frames, in place of --seconds.", within=(1, 1_000_000), line=True
    )
    seed: int = _video(
        "Seed of the noise; the same seed gives the same video. Several videos count on from it.",
        default=0,
        within=(0, 2**63 - 1),
        line=True,
    )
    out: str | None = _video(
        "The file to write, an .mp4, .webm or .gif; an older one is replaced. A name that ends in / is a folder of "
        "png. - is standard output: [cyan]flowcache generate PROMPT --out - | ffplay -[/cyan]. With several prompts, "
        "the folder that the videos go into.",
        metavar="FILE",
        shown="video.mp4, or the folder videos",
        batch=False,
    )
    keep_partial: bool = _video(
        "NAME.partial.mp4 plays while the video is made; keep it if the video is not finished.",
        default=False,
        batch=False,
    )
    checkpoint: Path | None = _safety(
        "Keep how far the video is in this folder. The same command goes on from there after it was killed, and ends "
        "with the same frames.",
        metavar="DIR",
        batch=False,
    )
    checkpoint_every: int = _safety(
        "Note how far a video is each time so many chunks have entered the window; 0 for never. After a loss it "
        "goes on from there.",
        default=4,
        within=(0, None),
        metavar="CHUNKS",
    )
    keep_state: bool = _safety(
        "Keep what [cyan]flowcache continue[/cyan] makes a finished video longer from: in the folder of its "
        "checkpoints, or in NAME.state beside it.",
        default=False,
    )
    preview: bool = _video(
        "Keep NAME.png up to date, a contact sheet of what is there of the video.", default=False, batch=False
    )
    height: int | None = _video("Pixels, a multiple of 16; the model's own by default.", within=(16, 16_384), line=True)
    width: int | None = _video("Pixels, a multiple of 16; the model's own by default.", within=(16, 16_384), line=True)
    steps: int | None = _video(
        "Denoising steps of a chunk, a multiple of the window (4); the model's own by default.",
        within=(1, 10_000),
        line=True,
    )

    script: Path | None = _video(
        "Prompts of later parts: a JSON object of times and prompts, such as "
        '{"4s": "a red circle moving left"}. A chunk is made of the one that holds when it begins.',
        metavar="FILE.json",
        called="prompts",
        batch=False,
        line=True,
    )
    prompt_at: list[str] | None = _video(
        'One of them on the command line: [cyan]--prompt-at 4s "a red circle moving left"[/cyan]; may be repeated.',
        metavar="TIME PROMPT",
        batch=False,
    )
    fps: int | None = _video(
        "Frames of a second of video, which the autoencoder's tiles follow; the model's own by default.",
        within=(16, 120),
        line=True,
    )
    window: int | None = _video(
        "Chunks that are denoised at once; fewer need less memory. The model's own by default.", within=(1, 64)
    )
    negative_prompt: str | None = _text(
        "SkyReels-V2: what the video is not to show; guidance leads away from it.",
        metavar="PROMPT",
        shown="the published one",
        line=True,
    )
    sampling: Literal["groups", "window", "staggered"] | None = _video(
        "SkyReels-V2: [bold]groups[/bold] of frames in order, which attend to those before, for any length; "
        "or a [bold]window[/bold] of 97 frames at once, as it was trained, which may begin with --image, or "
        "[bold]staggered[/bold], at noise levels of their own.",
        metavar="WAY",
        shown="groups",
    )
    special: str | None = _text(
        "Released models: what kind of video is wanted, from HQ, DURATION, STATIC, DYNAMIC, BORDERNESS, 3D and 2D; or "
        "none.",
        metavar="NAMES",
        shown="HQ,DURATION",
    )
    negative: bool = _text(
        "Released models: put the learned tokens of captions, logos, cuts and borders into the text that guidance "
        "leads away from.",
        default=False,
    )
    text_scales: str | None = _text(
        "Released base models: how strongly the text guides, one number or one for each of the times.",
        metavar="NUMBERS",
        shown="7.5,7.5,7.5,0,0",
    )
    chunk_scales: str | None = _text(
        "Likewise, how strongly the chunks before guide.", metavar="NUMBERS", shown="1.5,1.5,1.5,1,1"
    )
    guidance_times: str | None = _text(
        "Times from which each of these numbers holds, 0 noise and 1 clean.",
        metavar="NUMBERS",
        shown="0,0.0217,0.1,0.3,0.999",
    )
    image: Path | None = _start("A picture that the video begins with.", batch=False, line=True)
    video: Path | None = _start("A clip that the video goes on from.", batch=False, line=True)
    end_image: Path | None = _start(
        "SkyReels-V2 with --sampling window or staggered: a picture that the video ends with.", batch=False
    )
    video_from: ClipEnd = _start(
        "Which 32 frames of it: the last ones, or the first ones as in the released code.", default="end"
    )
    fit: Fit = _start(
        "How a picture or clip of another shape is made to fit. [bold]stretch[/bold] as in the released code, "
        "[bold]crop[/bold] cuts its longer sides, [bold]pad[/bold] adds black edges.",
        default="stretch",
    )

    cache: CacheName | None = _reuse(
        "Which steps are left out. [bold]flowcache-slow[/bold] and [bold]flowcache-fast[/bold] leave out those "
        "before which a chunk has hardly changed, each chunk for itself: slow stays close to the full computation, "
        "fast saves more. [bold]teacache[/bold] decides once for all chunks of the window, for comparison. "
        "[bold]none[/bold] computes everything. The options below change single figures of the preset. Released "
        "models have the figures that were published for them.",
        metavar="PRESET",
        shown="flowcache-slow for magi-pocket, none for released models",
    )
    cache_threshold: float | None = _reuse(
        "How much a chunk may change (relative L1, summed up) before it is computed again. Higher is faster, "
        "lower is closer to --cache none. [cyan]flowcache plot distance[/cyan] shows what a model's steps add to "
        "it.",
        within=(0, 1e9),
        metavar="NUMBER",
    )
    cache_warmup: int | None = _reuse(
        "First steps of a chunk that are always computed: they lay out the picture. With teacache, first steps "
        "of the video.",
        within=(1, 10**9),
        metavar="STEPS",
    )
    reuse: ReuseKind | None = _reuse(
        "What stands in for a step that is left out. [bold]residual[/bold]: the change of the last computed step "
        "once more, as published. [bold]velocity[/bold]: its velocity times the size of this step. "
        "[bold]extrapolate[/bold]: the last two velocities, continued to this step; measured on magi-pocket only.",
        metavar="KIND",
    )
    extrapolate_from: float | None = _reuse(
        "A middle way: once a chunk has changed by this share of the threshold, extrapolate, whatever --reuse "
        "says. 1 never does.",
        within=(0, 1),
        metavar="SHARE",
    )
    distance: Arithmetic | None = _reuse(
        "How far a chunk has changed is taken in [bold]fp32[/bold], or in [bold]bf16[/bold] with every step rounded, "
        "as the published FlowCache does. SkyReels-V2 has a distance of its own unless one is given here.",
        metavar="DTYPE",
    )
    clean_pass: bool | None = _passes(
        "Run each finished chunk once more, without noise, before others look back at it. With --cache none it "
        "is on; the presets of reuse leave it out, as published."
    )
    copy_pass: bool | None = _passes(
        "Distilled models: run the cleanest chunk twice, once without its past, and blend the two. With --cache "
        "none it is on; the presets of reuse leave it out, as published."
    )

    copy_weight: float | None = _passes(
        "Weight of that copy, which does not see the past, in the blend.", within=(0, 1), shown="0.3"
    )

    kv_budget: int | None = _memory(
        "Look back at the whole video, its keys and values compressed to the room of so many chunks. By default a "
        "model looks back at the few last chunks that it was released with. Either way a long video needs no more "
        "memory than a short one.",
        within=(1, 1_000_000),
        metavar="CHUNKS",
    )
    kv_offload: bool | None = _memory(
        "Keep the keys and values of finished chunks in the machine's memory, and on the GPU those of one layer and "
        "the next alone. The result is the same, bit for bit.",
        shown="on a GPU as the model's configuration says, and released ones say yes",
    )
    kv_score: TokenScore | None = _memory(
        "What the compression keeps first. [bold]flowcache[/bold]: what is asked for and unlike the rest, as "
        "published; [bold]importance[/bold] and [bold]redundancy[/bold] are its two parts alone. [bold]even[/bold]: an "
        "even share of every past chunk, for videos that come back to what they have shown, best with --kv-retention "
        "frame. [bold]recent[/bold] and [bold]random[/bold] are there for comparison.",
        shown="flowcache",
    )
    kv_retention: TokenUnit | None = _memory(
        "What the compression keeps or drops as one: single tokens, frames, or chunks.", shown="token"
    )
    kv_queries: TokenUnit | None = _memory(
        "Who says what is worth keeping: the last 50 tokens of the chunk that was denoised last, its last frame, "
        "or all of it.",
        shown="token",
    )

    record: Path | None = _record(
        "Write what happened to this folder: decisions, distances, times, what of the past was kept. "
        "[cyan]flowcache plot[/cyan] draws it. With several prompts, a sub-folder for each video.",
        metavar="RUN_DIR",
        batch=False,
    )

    pp: int = _ranks(
        "Pipeline: split the layers over so many stages. The chunks of the window flow through them; the result "
        "is the same, bit for bit. pp x cp ranks are started here, unless torchrun has started as many.",
        default=1,
        within=(1, None),
        metavar="STAGES",
    )
    cp: int = _ranks(
        "Context parallelism: share the tokens and heads of each stage among so many ranks; must divide the "
        "model's key heads.",
        default=1,
        within=(1, None),
        metavar="RANKS",
    )
    split: str | None = _ranks(
        "Layers of each stage, such as 9,9,8,8. By default the stages are made to cost the same.", metavar="LAYERS"
    )
    concurrency: int | None = _ranks(
        "How many videos are made at a time, of several; for a batch, by each gang. One video fills the stages "
        "only as far as its window of chunks goes.",
        within=(1, 10_000),
        metavar="VIDEOS",
        shown="2 on ranks, more from 5 stages on; 1 without ranks",
    )
    launcher: Literal["local", "ray"] = _ranks(
        "Who starts the ranks. local: torchrun, or this command on this machine. ray: a Ray cluster, the one that "
        "RAY_ADDRESS names, or one that is started here.",
        default="local",
        batch=False,
    )
    interface: str | None = _ranks(
        "Network interface that ranks on several machines listen at, such as eth1. On one machine they listen at "
        "the loopback address.",
        metavar="NAME",
        shown="the one of Ray's address; under torchrun all",
    )
    trace: Path | None = _ranks(
        "Write what each rank did when, for ui.perfetto.dev or chrome://tracing. With --record it is in RUN_DIR "
        "as trace.json as well, and [cyan]flowcache plot pipeline RUN_DIR[/cyan] draws it.",
        metavar="FILE.json",
        batch=False,
    )

    config: Path | None = _files("A released MAGI-1 JSON, as it is, in place of --model.")
    weights: Path | None = _files(
        "Folder of the weights, as downloaded, such as MAGI-1/ckpt/magi/4.5B_distill. Without --model the model is "
        "recognised. [bold]random[/bold]: random numbers of the model's sizes, to try a layout or to measure before a "
        "download. An autoencoder is searched in its sub-folder vae and around it (ckpt/vae), text encoders in t5."
    )
    special_tokens: Path | None = _files(
        "The special_tokens.npz of MAGI-1, if it is neither in the folder of the weights nor in example/assets.",
        metavar="FILE.npz",
        variable="SPECIAL_TOKEN_PATH",
    )
    t5_device: Literal["cpu", "cuda"] | None = _files(
        "Where T5 reads prompts; as the released configuration says by default."
    )
    t5_dtype: Literal["float32", "bfloat16"] | None = _files("Of T5; by default as its files have it.")
    prompt_cache: Path | None = _files(
        "Folder where encoded prompts are kept, so that T5 is not needed for them again.",
        metavar="DIR",
        shown="~/.cache/flowcache/prompts",
    )
    attention: str = _compute("auto, sdpa, flash-attn or xformers.", default="sdpa")
    precision: Literal["reference", "fast"] = _compute(
        "reference computes what was released; fast leaves out its fp32 output projections.",
        default="reference",
    )
    compile: bool = _compute(
        "MAGI-1: few kernels for what is not attention. For long videos on a GPU; needs a C++ compiler and a minute.",
        default=False,
    )
    threads: int | None = _compute(
        "CPU threads; by default all cores, shared evenly among ranks (torchrun and Ray, so a batch: 1 each).",
        within=(1, 1024),
        hint=f"; this machine has {os.cpu_count()} cores",
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinueOptions:
    """What was given to `flowcache continue`; errors as in `Options`."""

    what: Path = option(
        None, "The video, or the folder of its state.", default=MISSING, metavar="VIDEO_OR_DIR", argument=True
    )
    seconds: float = _video("How much longer, rounded up to whole chunks.", default=MISSING, within=(0.001, 1e6))
    prompt: str | None = _video("What the new part shows; by default what the end did.")
    out: str | None = _video(
        "As in [cyan]generate[/cyan]; by default the video is replaced when the longer one is whole."
    )
    keep_partial: bool = _video("As in [cyan]generate[/cyan].", default=False)
    preview: bool = _video("As in [cyan]generate[/cyan].", default=False)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class GangOptions:
    """What `flowcache batch` and `flowcache serve` are given of gangs; errors as in `Options`."""

    gangs: int = _gangs(
        "Groups of pp x cp ranks. Each holds the whole model and makes videos of its own.",
        default=1,
        within=(1, None),
        metavar="COUNT",
    )
    kv_memory: str | None = _gangs(
        "Memory of each rank for keys and values, such as 8GB; a gang takes in no more videos than fit.",
        metavar="SIZE",
        shown="enough for --concurrency",
    )
    checkpoints: Path | None = _safety(
        "Folder of checkpoints; every node must see it. They are deleted with the end of a video.",
        metavar="DIR",
        shown="in the folder of the videos",
    )
    max_restarts: int = _safety(
        "How often gangs may be started again, all together; after that the lost ones stay lost.",
        default=20,
        within=(0, None),
        metavar="COUNT",
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions(GangOptions):
    """What was given to `flowcache batch` beside the options that `Options` has for it too; errors as there."""

    file: Path = option(None, "A JSON object in each line.", default=MISSING, metavar="FILE.jsonl", argument=True)
    out: Path = option(None, "Folder of the videos; made if it is missing.", default=Path("videos"), metavar="DIR")
    base: Options = field(default_factory=Options)  # holds where a line says nothing; its ranks are those of a gang


GOLDEN_FILES = Opt("Golden files; their weights file lies beside them.", argument=True, name="files", kind=list[Path])
"""What `flowcache conformance` is given."""
GOLDEN_DEVICE = Opt(
    "Where to compute. On ranks: the CPU, or a GPU for each as far as there are GPUs.",
    shown="the CPU; on ranks GPUs if there are any",
    name="device",
    kind=Literal["cpu", "cuda"] | None,
    default=None,
)
"""The same, beside the options of ranks."""


def together(options: Options, videos: int, *, ranks: bool | None = None) -> int:
    """How many of several videos are made at a time: `--concurrency`, or its default.

    Without ranks that is one. On ranks one video has as many chunks in flight as its window holds, 4, less what is
    reused. So two fill up to four or five stages, and every two stages more want another one. `ranks` says whether
    ranks make them; None is for what the options say.
    """
    on_ranks = options.pp * options.cp > 1 if ranks is None else ranks
    return min(videos, options.concurrency or (max(2, (options.pp + 1) // 2) if on_ranks else 1))


def ray_address() -> str | None:
    """Where the Ray cluster is to be joined; None for one that is started on this machine."""
    return os.environ.get("RAY_ADDRESS") or None


def threads_of_a_rank(options: Options) -> int:
    """CPU threads of each rank on Ray; they change the bits of a video, so the default is one wherever it runs."""
    return options.threads or 1


def parse_size(text: str) -> int:
    """Bytes of a text such as `8GB`, `512 MB` or `1.5g`; an `InputError` if it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if found is None:
        raise InputError(f"{text!r} is no size: write one such as 8GB")
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2] or " "))


def size_text(count: int) -> str:
    """Bytes as text, such as `8.0 GB`."""
    unit, name = next(((unit, name) for unit, name in ((10**9, "GB"), (10**6, "MB")) if count >= unit), (1000, "kB"))
    return f"{count / unit:,.1f} {name}"

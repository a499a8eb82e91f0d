"""`flowcache models` and `flowcache inspect`: what models there are, what a folder of weights holds, what they take."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.kv.layout import KVSettings
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from launch.memory import Job
from launch.options import size_text
from models.checkpoint import Stored, read_through
from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig
from models.magi.folder import ModelFiles, dit_folder, find_files, recognise
from models.magi.presets import PRESETS, Preset, preset_of
from models.magi.random import vae_config
from models.magi.text import T5_FOLDER, SpecialTokens, check_t5
from models.magi.weights import Checkpoint
from parallel.mesh import Layout

_BLOCK = 1 << 24  # bytes that are hashed at once
_LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 4))  # pp x cp
_CHUNKS = 10  # length of the video that memory is worked out for; a longer one takes no more, unless nothing is dropped


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The video that memory is worked out for; None is the model's own."""

    height: int | None = None
    width: int | None = None
    chunks: int | None = None
    kv_budget: int | None = None


class _Report:
    """What was found so far: rows of a table, and what is wrong."""

    def __init__(self) -> None:
        self.table = Table("Part", "Where", "What", box=None, pad_edge=False)
        self.table.columns[1].overflow = "fold"
        self.wrong: list[str] = []

    def look(self, name: str, where: Path, look: Callable[[], str]) -> None:
        """Add what `look` says of a part, or what it finds wrong."""
        try:
            self.table.add_row(name, str(where), look())
        except InputError as error:
            self.table.add_row(name, str(where), "[red]damaged[/red]")
            self.wrong.append(str(error))


def inspect_folder(folder: Path, wanted: Wanted, *, tokens: Path | None, verify: bool) -> int:
    """Print what a folder holds; an `InputError` says that there is no model in it.

    Args:
        folder: as for `--weights`.
        wanted: the video that memory is worked out for.
        tokens: as in `find_files`.
        verify: read all weights, and compare with the checksums that lie beside them.

    Returns:
        The exit status: 0, or 1 if something is missing or damaged.
    """
    config, console, report = recognise(folder), Console(), _Report()
    console.print(f"[bold]{folder}[/bold]: {describe(config)}", highlight=False, soft_wrap=True)
    of_dit, of_vae = dict[str, Stored](), dict[str, Stored]()
    dit = dit_folder(config, folder)
    report.look("DiT", dit, lambda: _tensors(of_dit, Checkpoint(dit).check_dit(config)))
    try:
        files: ModelFiles | None = find_files(config, folder, tokens=tokens)
    except InputError as error:
        files = None
        report.wrong.append(str(error))
    if files is not None:
        found = files
        report.look("autoencoder", found.vae, lambda: _tensors(of_vae, Checkpoint(found.vae).check_vae()))
        if (t5 := found.t5) is not None:
            report.look("T5", t5 / T5_FOLDER, lambda: f"weights of {size_text(check_t5(t5 / T5_FOLDER))}")
        if (special := found.tokens) is not None:
            report.look("special tokens", special, lambda: _special(special, config))
    console.print(report.table, highlight=False)
    console.print()
    for line in report.wrong:
        console.print(f"[red]{line}[/red]", highlight=False, soft_wrap=True)
    if not report.wrong:
        assert files is not None
        _print_memory(console, config, Checkpoint(files.vae).vae_config(), wanted)
    damaged = _verify(console, [of_dit, of_vae]) if verify and not report.wrong else 0
    return 1 if report.wrong or damaged else 0


def describe(config: MagiConfig) -> str:
    """What a model is, in words: the preset that it is, or its kind and size."""
    model, engine = config.model_config, config.engine_config
    if (preset := preset_of(config)) is not None:
        return f"{preset.name} ({preset.summary})"
    kind = ("distilled" if engine.distill else "base") + (", fp8 weights" if engine.fp8_quant else "")
    return f"a MAGI-1 model of {model.num_layers} layers and {model.hidden_size} channels, {kind}"


def _tensors(into: dict[str, Stored], found: Mapping[str, Stored]) -> str:
    into |= found
    dtypes = Counter[str]()
    for one in found.values():
        dtypes[one.dtype] += one.end - one.start
    count = sum(_parameters(one) for one in found.values())
    shares = ", ".join(f"{dtype} {size_text(size)}" for dtype, size in dtypes.most_common())
    return f"{len(found)} tensors, {count:,} parameters: {shares}"


def _parameters(stored: Stored) -> int:
    count = 1
    for size in stored.shape:
        count *= size
    return count


def _special(path: Path, config: MagiConfig) -> str:
    SpecialTokens.from_npz(path, channels=config.model_config.caption_channels)
    return "quality and duration"


def _print_memory(console: Console, config: MagiConfig, vae: VaeConfig, wanted: Wanted) -> None:
    runtime = config.runtime_config
    request = Request(
        prompt="-",
        chunks=_CHUNKS if wanted.chunks is None else wanted.chunks,
        height=runtime.video_size_h if wanted.height is None else wanted.height,
        width=runtime.video_size_w if wanted.width is None else wanted.width,
        num_steps=runtime.num_steps,
        seed=0,
    )
    budget = wanted.kv_budget
    size = f"{request.width}x{request.height}, {request.chunks} chunks"
    held = "the model's own range" if budget is None else f"a budget of {budget} chunks"
    console.print(f"Memory of each rank, estimated, for one video of {size}, with {held}:", highlight=False)
    table = Table("pp x cp", "weights", "keys and values", "at work", "together", box=None, pad_edge=False)
    for pp, cp in _LAYOUTS:
        job = Job(
            config=config, vae=vae, request=request, reuse=ReuseSettings(), kv=KVSettings(budget=budget),
            layout=Layout(pp=pp, cp=cp),
        )  # fmt: skip
        try:
            most = max(job.stages(), key=lambda stage: stage.total)
        except InputError:  # the model cannot be laid out so; in one process, it cannot make the video
            if (pp, cp) == (1, 1):
                raise
            continue
        table.add_row(f"{pp} x {cp}", *map(size_text, (most.weights, most.kv + most.texts, most.work, most.total)))
    console.print(table, highlight=False)
    if config.runtime_config.t5_pretrained is not None:
        console.print(f"T5 encodes on {runtime.t5_device!r} before that, and is let go.", highlight=False)


# ---- --verify


def _verify(console: Console, networks: Sequence[Mapping[str, Stored]]) -> int:
    """Read every tensor, and compare files with checksums beside them; gives how many are damaged."""
    damaged, agree = 0, 0
    progress = Progress(console=Console(stderr=True))
    with progress:
        for stored in networks:
            task = progress.add_task("reading weights", total=len(stored))
            try:
                for _ in read_through(stored):
                    progress.advance(task)
            except InputError as error:
                damaged += 1
                console.print(f"[red]{error}[/red]", highlight=False, soft_wrap=True)
        files = sorted({one.path for stored in networks for one in stored.values()})
        for path in progress.track(files, description="comparing checksums"):
            for beside, expected in _checksums(path):
                if (actual := _sha256(path)) == expected:
                    agree += 1
                    continue
                damaged += 1
                console.print(
                    f"[red]{path} is damaged: its SHA-256 is {actual}, but {beside} says {expected}[/red]",
                    soft_wrap=True,
                )
    if not damaged:
        sums = f"{agree} checksums agree" if agree else "there are no checksums beside them"
        console.print(f"All {sum(map(len, networks))} tensors are numbers; {sums}.", highlight=False)
    return damaged


def _checksums(path: Path) -> Iterator[tuple[Path, str]]:
    """The SHA-256 that files beside a file say it has: NAME.sha256, or a line of SHA256SUMS."""
    for beside in (path.with_name(path.name + ".sha256"), path.with_name("SHA256SUMS")):
        if not beside.is_file():
            continue
        for line in beside.read_text(errors="replace").splitlines():
            found = re.fullmatch(r"\s*([0-9a-fA-F]{64})(?:\s+\*?(.+?))?\s*", line)
            if found and (found[2] is None or Path(found[2]).name == path.name):
                yield beside, found[1].lower()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# ---- the presets


_NOTES = """\
Disk: the DiT and the autoencoder as stored; of a released model also T5 (19 GB). Those share autoencoder and T5.
Memory: an estimate for one video of that size on one device: weights, keys and values of the window and one finished \
chunk (twice with guidance), and what a layer works with. T5 (19 GB) is read before, and let go; a gang \
of batch holds it.
Weights of released models: huggingface.co/sand-ai/MAGI-1. Download the folder above, ckpt/vae and ckpt/t5, and name \
the first with --weights; flowcache inspect says what is missing. special_tokens.npz, of the MAGI-1 code's \
example/assets, is found in a checkout around it, or goes into the folder. \
T5 needs pip install 'flowcache-engine[t5]'."""


def show_models() -> None:
    """Print the presets, their sizes, and what each needs."""
    console = Console()
    sizes = Table("Model", "Parameters", "Video", "Steps", "Disk", "Memory")
    kinds = Table("Model", "What it is", "Weights")
    kinds.columns[0].no_wrap = kinds.columns[2].no_wrap = True
    for preset in PRESETS.values():
        run, count = preset.config().runtime_config, preset.parameters
        parameters = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
        disk, memory = size_text(preset.disk), size_text(_preset_memory(preset))
        size = f"{run.video_size_w}x{run.video_size_h}"
        sizes.add_row(preset.name, parameters, size, str(run.num_steps), disk, memory)
        kinds.add_row(preset.name, preset.summary, preset.folder or "ship with the project")
    console.print(sizes)
    console.print(kinds)
    console.print(_NOTES, highlight=False, markup=False)


def _preset_memory(preset: Preset) -> int:
    """Bytes on one device for one video of the preset's size."""
    config = preset.config()
    run = config.runtime_config
    height, width, chunks = run.video_size_h, run.video_size_w, 2 * run.window_size
    request = Request(prompt="-", chunks=chunks, height=height, width=width, num_steps=run.num_steps, seed=0)
    job = Job(
        config=config, vae=vae_config(config), request=request, reuse=ReuseSettings(), kv=KVSettings(), layout=Layout()
    )
    return job.total(shared=False)

"""`flowcache models` and `flowcache inspect`: what models there are, what a folder of weights holds, what they take."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.kv.layout import KVSettings
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from launch.model.memory import Job
from launch.options import Options, size_text
from models.checkpoint import Stored, read_through
from models.errors import InputError
from models.families import FAMILIES, describe, family_of, presets, recognise
from models.family import ModelConfig, Part, Preset
from parallel.mesh import Layout

_LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 4))  # pp x cp
_CHUNKS = 10  # length of the video that memory is worked out for; a longer one takes no more, unless nothing is dropped


class _Report:
    """What was found so far: rows of a table, and what is wrong."""

    def __init__(self) -> None:
        self.table = Table("Part", "Where", "What", box=None, pad_edge=False)
        self.table.columns[1].overflow = "fold"
        self.wrong: list[str] = []

    def look(self, part: Part, networks: list[Mapping[str, Stored]]) -> None:
        """Add what there is of a part, or what is wrong with it; its tensors to `networks`."""
        try:
            found = part.check()
        except InputError as error:
            self.table.add_row(part.name, str(part.where), "[red]damaged[/red]")
            self.wrong.append(str(error))
            return
        if isinstance(found, Mapping):
            networks.append(found)
            found = _tensors(found)
        self.table.add_row(
            part.name, str(part.where), f"weights of {size_text(found)}" if isinstance(found, int) else found
        )


def inspect_folder(folder: Path, wanted: Options, *, tokens: Path | None, verify: bool) -> int:
    """Print what a folder of weights holds; an `InputError` says that there is no model in it.

    Memory is worked out for the `wanted` video; `tokens` are as in `find_files`. Gives the exit status: 0, or 1 if
    something is missing or damaged.
    """
    config, console, report = recognise(folder), Console(), _Report()
    console.print(f"[bold]{folder}[/bold]: {describe(config)}", highlight=False, soft_wrap=True)
    places, networks = dict[str, Path](), list[Mapping[str, Stored]]()
    try:
        for part in family_of(config).parts(config, folder, tokens):
            places[part.name] = part.where
            report.look(part, networks)
    except InputError as error:
        report.wrong.append(str(error))
    console.print(report.table, highlight=False)
    console.print()
    for line in report.wrong:
        console.print(f"[red]{line}[/red]", highlight=False, soft_wrap=True)
    if not report.wrong:
        _print_memory(console, _job(config, family_of(config).vae_bytes(config, places["autoencoder"]), wanted))
    damaged = _verify(console, networks) if verify and not report.wrong else 0
    return 1 if report.wrong or damaged else 0


def _tensors(found: Mapping[str, Stored]) -> str:
    dtypes = Counter[str]()
    for one in found.values():
        dtypes[one.dtype] += one.end - one.start
    shares = ", ".join(f"{dtype} {size_text(size)}" for dtype, size in dtypes.most_common())
    return f"{len(found)} tensors, {sum(one.size for one in found.values()):,} parameters: {shares}"


def _job(config: ModelConfig, vae_bytes: int, wanted: Options) -> Job:
    """One video on one rank; what is not said of it is the model's own."""
    known, kv = config.figures, KVSettings(budget=wanted.kv_budget)
    request = Request(
        prompt="-",
        chunks=wanted.chunks or min(_CHUNKS, known.most_chunks or _CHUNKS),
        height=wanted.height or known.height,
        width=wanted.width or known.width,
        num_steps=known.num_steps,
        seed=0,
    )
    return Job(config=config, vae_bytes=vae_bytes, request=request, reuse=ReuseSettings(), kv=kv, layout=Layout())


def _print_memory(console: Console, one: Job) -> None:
    request, budget, known = one.request, one.kv.budget, one.config.figures
    size = f"{request.width}x{request.height}, {request.chunks} chunks"
    held = "the model's own range" if budget is None else f"a budget of {budget} chunks"
    console.print(f"Memory of each rank, estimated, for one video of {size}, with {held}:", highlight=False)
    names = "weights", "keys, values", "at work", "together", "--kv-offload", "host"
    table = Table("pp x cp", *names, box=None, pad_edge=False)
    for pp, cp in _LAYOUTS:
        job = replace(one, layout=Layout(pp=pp, cp=cp))
        try:
            most = max(job.stages(), key=lambda stage: stage.total)
            less = max(replace(job, kv=replace(job.kv, offload=True)).stages(), key=lambda stage: stage.total)
        except InputError:  # the model cannot be laid out so; in one process, it cannot make the video
            if (pp, cp) == (1, 1):
                raise
            continue
        sizes = most.weights, most.kv + most.texts, most.work, most.total, less.total, less.host
        table.add_row(f"{pp} x {cp}", *map(size_text, sizes))
    console.print(table, highlight=False)
    if known.encodes_on is not None:
        text = f"The text encoder works on {known.encodes_on} before that, and is let go."
        console.print(text, highlight=False)


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the presets


_NOTES = """\
Disk: the DiT and the autoencoder as stored; of a released model also its text encoder. Models of a family share it.
Memory: an estimate for one video of that size on one device: weights, keys and values of the window and one finished \
chunk (twice with guidance), and what a layer works with."""


def show_models() -> None:
    """Print the presets, their sizes, and what each needs."""
    console = Console()
    sizes = Table("Model", "Parameters", "Video", "Steps", "Disk", "Memory")
    kinds = Table("Model", "What it is", "Weights")
    kinds.columns[0].no_wrap = kinds.columns[2].no_wrap = True
    for preset in presets().values():
        known, count = preset.config().figures, preset.parameters
        parameters = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
        disk, memory = size_text(preset.disk), size_text(_preset_memory(preset))
        sizes.add_row(preset.name, parameters, f"{known.width}x{known.height}", str(known.num_steps), disk, memory)
        kinds.add_row(preset.name, preset.summary, preset.folder or "ship with the project")
    console.print(sizes)
    console.print(kinds)
    for notes in (_NOTES, *(family.notes for family in reversed(FAMILIES))):
        console.print(notes, highlight=False, markup=False)


def _preset_memory(preset: Preset) -> int:
    """Bytes on one device for one video of the preset's size."""
    config = preset.config()
    wanted = Options(chunks=config.figures.most_chunks or _CHUNKS)
    return _job(config, family_of(config).vae_bytes(config, None), wanted).total(shared=False)

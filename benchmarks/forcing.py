"""Diffusion forcing made several ways on one model in one run: what structure saves, and what reuse saves on top.

    python -m benchmarks.forcing

The whole window at once, as SkyReels-V2 publishes it, with and without TeaCache; its groups as chunks, which attend to
what came before through KV and rest when they are not denoised (structure); and FlowCache on those (reuse). Weights are
those of the golden files, small and random, so pictures are not shown: PSNR is of latents. Operations are those that
the same passes take on SkyReels-V2 1.3B at 540p. Exit status 0 if groups alone save what they should, and reuse more, 1
if not, 2 for bad input.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import common
from benchmarks.common import Out, Row, Verdict
from engine.engine import Engine, Submission
from engine.executor import LocalRunner
from engine.request import Encoded, Request
from engine.reuse.policy import CONDITION, ReuseSettings
from engine.video import Work, seeded_noise
from launch.conformance.golden import read_golden
from launch.conformance.wan_generation import Latents, wan_runs
from models.protocols import CELL_PIXELS, CaptionTable, Sampling
from models.wan.dit import WanDiT
from models.wan.sampling.changes import KEPT_STEPS, POLYNOMIALS, condition_changes
from models.wan.sampling.forcing import BlockSampling, WindowSampling

_GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "goldens" / "skyreels" / "flowcache_slow.safetensors"
_DIM, _FFN, _LAYERS, _TEXT = 1536, 8960, 30, 512  # of 1.3B
_FRAME_TOKENS = 2040  # of a latent frame at 540p
_STRUCTURE = 1.5  # groups alone save at least this, of the published two

_Number = Annotated[int, typer.Option(min=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What one way took and made."""

    what: str
    latents: Tensor
    passes: int
    operations: float  # on 1.3B at 540p
    computed: float  # share of the steps
    seconds: float


class _Counting(LocalRunner):
    """Counts passes, and what they would take on a large model."""

    def __init__(self, model: WanDiT, frames: int) -> None:
        super().__init__(model, model.attention)
        self.passes, self.operations, self._frames = 0, 0.0, frames

    def begin(self, work: Work) -> None:
        """Run an item."""
        item = work.item
        first = item.chunk if item.what.isolated else item.keys_from or 0
        self.passes += 1
        self.operations += pass_operations(self._frames, (item.chunk + 1 - first) * self._frames)
        super().begin(work)


def pass_operations(frames: int, key_frames: int) -> float:
    """Of a pass of 1.3B at 540p over so many latent frames that attend to so many: products and attention."""
    tokens, keys = frames * _FRAME_TOKENS, key_frames * _FRAME_TOKENS
    products = tokens * (6 * _DIM**2 + 2 * _DIM * _FFN) + _TEXT * 2 * _DIM**2
    attention = 2 * _DIM * tokens * (keys + _TEXT)
    return 2.0 * _LAYERS * (products + attention)


def make(what: str, model: WanDiT, sampling: Sampling, reuse: ReuseSettings, captions: CaptionTable) -> Made:
    """Make one window in one way."""
    height, width, frames = 4, 6, sampling.chunk_width
    chunks = sampling.chunks_at_once or 1
    request = Request(
        prompt=what,
        chunks=chunks,
        height=height * CELL_PIXELS,
        width=width * CELL_PIXELS,
        num_steps=sampling.num_steps,
        seed=0,
    )
    whole = seeded_noise(0)(0, (1, model.latent_channels, chunks * frames, height, width), 0)
    parts = whole.split(frames, dim=2)

    def noise(chunk: int, shape: tuple[int, ...], draw: int) -> Tensor:
        return parts[chunk].clone()

    encoded = Encoded(captions=captions, prefix=None, noise=lambda span: noise)
    runner, told, began = _Counting(model, frames), list[float](), time.perf_counter()
    engine = Engine(Latents(model=model, how=sampling), runner, reuse=reuse)
    submission = Submission(request=request, encoded=encoded)
    made = [
        chunk.latents
        for chunk in engine.generate(submission, lambda one: told.append(one.computed_fraction), decode=False)
    ]
    return Made(
        what=what,
        latents=torch.cat(made, dim=2),
        passes=runner.passes,
        operations=runner.operations,
        computed=told[-1],
        seconds=time.perf_counter() - began,
    )


def ways(model: WanDiT, common_figures: dict[str, Any]) -> list[tuple[str, Sampling, ReuseSettings]]:
    """What is compared: a name, how it is sampled, and what is reused."""
    window, groups = WindowSampling(**common_figures), BlockSampling(**common_figures)
    rows = [window.times(row) for row in range(window.num_steps)]
    window = replace(window, changes=condition_changes(model, rows, window.fps))
    steps: list[tuple[float, ...]] = [(float(time),) for time in groups.sigmas.timesteps]
    groups = replace(groups, changes=condition_changes(model, steps, groups.fps))
    none = ReuseSettings(clean_pass=False, copy_pass=False)
    published = replace(none, warmup_steps=KEPT_STEPS[True], distance=CONDITION, polynomial=POLYNOMIALS["1.3B", True])
    cycle = window.num_steps
    return [
        ("whole window, staggered", window, none),
        ("whole window, in step", replace(window, ar_step=0, changes=None), none),
        ("TeaCache 0.2", window, replace(published, policy="teacache-cyclic", threshold=0.2, cycle=cycle)),
        ("groups", groups, none),
        ("groups, renewed when finished", replace(groups, clean_pass=True), replace(none, clean_pass=True)),
        ("FlowCache slow, 0.1", groups, replace(published, policy="flowcache", threshold=0.1)),
        ("FlowCache fast, 0.15", groups, replace(published, policy="flowcache", threshold=0.15)),
        (
            "FlowCache by patches, 0.12",
            groups,
            replace(none, policy="flowcache", threshold=0.12, warmup_steps=KEPT_STEPS[True]),
        ),
    ]


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Of latents, with the range of those that are wanted as the peak; infinite if they are equal."""
    error = (made - wanted).square().mean()
    return (20 * torch.log10(wanted.max() - wanted.min()) - 10 * torch.log10(error)).item()


def run(
    steps: _Number = 50,
    frames: Annotated[int, typer.Option(min=2, help="Latent frames of the window.")] = 25,
    block: Annotated[int, typer.Option(min=1, help="Latent frames of a group.")] = 5,
    ar_step: Annotated[int, typer.Option(min=1, help="Rows between two groups that begin.")] = 5,
    out: Out = Path("results/forcing"),
) -> int:
    """Structure and reuse apart, on diffusion forcing."""
    common.output_folder(out)
    golden = read_golden(_GOLDEN, "cpu")
    model = wan_runs(golden)[0].load(None)
    text, negative = (golden.tensor(f"input.{name}")[0] for name in ("context", "negative_context"))
    figures = {"steps": steps, "block": block, "ar_step": ar_step, "frames": frames}
    made = [make(*way, CaptionTable(text=text, null=negative)) for way in _with_model(model, figures)]
    return report(out, made, f"{frames} latent frames, groups of {block}, {ar_step} rows apart, {steps} steps")


def _with_model(model: WanDiT, figures: dict[str, Any]) -> list[tuple[str, WanDiT, Sampling, ReuseSettings]]:
    return [(what, model, sampling, reuse) for what, sampling, reuse in ways(model, figures)]


def report(out: Path, made: Sequence[Made], about: str) -> int:
    """Write and print what was measured; the exit status."""
    by_name = {one.what: one for one in made}
    window, groups = by_name["whole window, staggered"], by_name["groups"]
    rows: list[Row] = []
    for one in made:
        reused_of = groups if one.what.startswith("FlowCache") else window
        baseline = one if one.computed == 1 else reused_of
        rows.append(
            {
                "what": one.what,
                "passes": one.passes,
                "computed": one.computed,
                "PFLOP on 1.3B": one.operations / 1e15,
                "speed-up": window.operations / one.operations,
                "by structure": window.operations / baseline.operations,
                "by reuse": baseline.operations / one.operations,
                "PSNR to window": psnr(one.latents, window.latents),
                "PSNR to groups": psnr(one.latents, groups.latents),
                "seconds": one.seconds,
            }
        )
    structure = window.operations / groups.operations
    slow, fast = by_name["FlowCache slow, 0.1"], by_name["FlowCache fast, 0.15"]
    saved = f"{structure:.2f} x"
    verdicts = [
        Verdict("groups over the whole window, operations", saved, f">= {_STRUCTURE} x", structure >= _STRUCTURE),
        Verdict(
            "reuse on top, slow and fast",
            f"{groups.operations / slow.operations:.2f} x, {groups.operations / fast.operations:.2f} x",
            "more than 1 x, fast no less than slow",
            groups.operations > slow.operations >= fast.operations,
        ),
    ]
    return common.publish(
        out,
        "forcing",
        title="Diffusion forcing: structure and reuse",
        about=(
            f"{about}, guidance 6; small random weights of the golden files. {common.machine_line()}.\n\n"
            "Structure: groups rest when they are not denoised, and attend to what came before through KV; it changes "
            "the video of a model that was trained on whole windows. Reuse is counted against groups without it. "
            "Seconds are of the small model, in which everything but its layers weighs more than it should."
        ),
        verdicts=verdicts,
        sections={"Ways": rows},
        data=rows,
    )


if __name__ == "__main__":
    sys.exit(common.run_command(run, "forcing"))

"""`flowcache conformance`: run what a published implementation ran, and compare (docs/conformance.md)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from launch.conformance import parts
from launch.conformance.forward import make_forward, make_released_forward, make_wan_forward
from launch.conformance.generation import made_by, runs_of
from launch.conformance.golden import Golden, Verdict, compare, read_golden, without_weights
from launch.conformance.wan_generation import wan_made_by, wan_runs
from launch.generate import join_ranks, needs_ranks, start_ranks
from launch.options import Options
from models.errors import InputError
from parallel.health.exit_codes import BAD_INPUT, FAILED, OK
from parallel.health.failure import GangError
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang

_Figures = Iterable[tuple[str, Tensor]]
_PARTS: dict[str, Callable[[Golden], _Figures]] = {
    "vae": parts.make_vae,
    "kv_selection": parts.make_selection,
    "fp8_linear": parts.make_fp8_linear,
    "scheduler": parts.make_scheduler,
    "timestep_matrix": parts.make_timestep_matrix,
    "forward": make_forward,
    "released_forward": make_released_forward,
    "wan_forward": make_wan_forward,
    "wan_forward_bf16": make_wan_forward,
}
_MAGI, _WAN = (runs_of, made_by), (wan_runs, wan_made_by)
_VIDEOS: dict[str, tuple[Callable[[Golden], list[Any]], Callable[..., _Figures]]] = {
    "generation": _MAGI,
    "reuse_decisions": _MAGI,
    "wan_generation": _WAN,
    "wan_generation_bf16": _WAN,
    "wan_self_forcing": _WAN,
}
"""Kinds of whole videos: their runs, and what these have made."""


def check_file(path: Path, *, device: str = "cpu") -> Verdict:
    """Make a golden file's figures again in this process and compare; an `InputError` if it cannot be read."""
    golden = read_golden(path, device)
    return compare(golden, remake(golden))


def remake(golden: Golden) -> list[tuple[str, Tensor]]:
    """A golden file's figures as this engine makes them in this process, by the names of the file's tensors."""
    return _figures(golden, [run.make(run.load(None), None) for run in _runs(golden)])


def _runs(golden: Golden) -> list[Any]:
    """The runs of a file of whole videos; none of other kinds."""
    return _VIDEOS[golden.kind][0](golden) if golden.kind in _VIDEOS else []


@torch.no_grad()
def _figures(golden: Golden, results: Sequence[Any]) -> list[tuple[str, Tensor]]:
    return list(_PARTS[golden.kind](golden) if golden.kind in _PARTS else _VIDEOS[golden.kind][1](golden, results))


def check_on_gang(
    gang: Gang,
    files: Sequence[Path],
    *,
    split: str | None = None,
    on_verdict: Callable[[Verdict], None],
    on_unreadable: Callable[[InputError], None] | None = None,
) -> None:
    """Check golden files on all ranks: whole videos are made by the gang, the other kinds on the leader.

    Every rank calls this with the same files; `split` is as in `stage_sizes`. The leader is given each verdict, and the
    error of each file that cannot be read; the others are checked all the same. Without `on_unreadable` the first such
    file ends the gang.

    An `InputError` if a file cannot be read, or the layout does not fit its model.
    """
    for path in files:
        serving = False
        try:
            golden, results = read_golden(path, str(gang.device)), list[Any]()
            for run in _runs(golden):
                model = run.load(run.layers(gang.mesh, split))
                serving = True
                if gang.mesh.leads:
                    results.append(run.make(model, gang))
                else:
                    run.serve(model, gang)
                serving = False
            if gang.mesh.leads:
                on_verdict(compare(golden, _figures(golden, results)))
        except InputError as error:
            if serving or on_unreadable is None:  # the others serve the model, and must be ended
                raise
            if gang.mesh.leads:
                on_unreadable(error)


# ---- the command


def check_conformance(
    files: Sequence[Path],
    options: Options,
    arguments: Sequence[str],
    *,
    device: str | None,
    report_error: Callable[[str], None],
) -> int:
    """Check golden files, one line for each, also where one cannot be read; of the options only the ranks count.

    Files of weights that lie beside them are left out.

    Returns:
        The exit status: 0 if all pass, 1 if one fails, 2 if one cannot be read.

    Raises:
        InputError: the layout or the device cannot be used.
        CommandFailed: on ranks, one has failed, or a file does not pass or cannot be read.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but this machine has no CUDA GPU: leave it out")
    env, files = RankEnv.from_environment(), without_weights(files)
    if env is None and needs_ranks(options):
        start_ranks(arguments, options)
        return OK
    failed: list[str] = []
    unreadable: list[InputError] = []
    layout = "" if env is None else f", pp {options.pp} x cp {options.cp}"

    def take(verdict: Verdict) -> None:
        _show(verdict, layout)
        if not verdict.passed:
            failed.append(verdict.name)

    if env is None:
        for path in files:
            try:
                take(check_file(path, device=device or "cpu"))
            except InputError as error:
                unreadable.append(error)
                report_error(str(error))
        return BAD_INPUT if unreadable else FAILED if failed else OK
    on = torch.device("cpu") if device == "cpu" else None
    with join_ranks(env, options, device=on) as gang:  # anything but success ends all ranks
        check_on_gang(gang, files, split=options.split, on_verdict=take, on_unreadable=unreadable.append)
        if unreadable:
            raise InputError("; ".join(dict.fromkeys(map(str, unreadable))))
        if failed:
            raise GangError(gang.monitor.fail(f"these do not pass: {', '.join(failed)}", status=FAILED))
    return OK


def _show(verdict: Verdict, layout: str) -> None:
    word, style = ("PASS", "green") if verdict.passed else ("FAIL", "bold red")
    allowed = f"({verdict.tolerance:.1e} allowed)" if verdict.tolerance else "(none allowed)"
    line = f"{verdict.name:<30} relative error {verdict.error:.2e} {allowed}  {verdict.detail}{layout}  {word}"
    Console().print(line, style=style, highlight=False, markup=False, soft_wrap=True)

"""What one layer of full size asks of a GPU, counted without one: `python -m benchmarks.layer_cost`.

The layer runs on the meta device and every operation is written down. Besides products and attention there are norms,
casts, rotary positions, gates and copies; such a kernel reads its inputs and writes its outputs once. In a compiled
layer a run of them between products is one kernel, which reads what comes from outside the run and writes what is read
behind it. That is a model of the compiler and not its own count: a norm over rows that do not fit into registers is
read twice.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import Row, run_command, table
from benchmarks.workload import ChunkPass
from models.checkpoint import Loading
from models.magi.presets import released_config
from models.magi.weights import empty_dit

_PRODUCTS = ("mm", "addmm", "bmm", "_scaled_mm", "linear", "matmul")
_VIEWS = ("view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "split", "unsqueeze", "squeeze",
          "expand", "unbind", "detach", "alias", "as_strided", "split_with_sizes", "empty", "empty_like")  # fmt: skip


@dataclass(slots=True)
class Kernel:
    """One kernel, or a run of elementwise ones: the tensors that it reads and writes, by number, with their bytes."""

    kind: str  # product, attention, elementwise, or copy: into the KV buffer, which is outside the compiled regions
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """All that is read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


class Counted(TorchDispatchMode):
    """Writes down the kernels of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._numbers: dict[int, int] = {}
        self._held: list[Any] = []  # so that no storage's address is given out twice

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], arguments: Any = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and write it down."""
        made = function(*arguments, **(named or {}))
        name = str(function).removeprefix("aten.").split(".")[0]
        if name in _VIEWS or (name == "_to_copy" and made is arguments[0]):
            return made
        kind = "product" if name in _PRODUCTS else "copy" if name == "copy_" else "elementwise"
        given = [one for one in tree_leaves((arguments, named)) if isinstance(one, Tensor)]
        if kind == "copy":  # what is overwritten is not read
            given = given[1:]
        written = [one for one in tree_leaves(made) if isinstance(one, Tensor)]
        self.kernels.append(Kernel(kind, self._sizes(given), self._sizes(written)))
        return made

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stands for a kernel of attention that takes grouped heads as they are."""
        made = torch.empty_like(q)
        self.kernels.append(Kernel("attention", self._sizes([q, k, v]), self._sizes([made])))
        return made

    def _sizes(self, tensors: list[Tensor]) -> dict[int, int]:
        """Bytes of the parts of storages that are used, by the numbers of the storages."""
        sizes: dict[int, int] = {}
        for one in tensors:
            storage = one.untyped_storage()
            self._held.append(storage)
            number = self._numbers.setdefault(storage._cdata, len(self._numbers))
            sizes[number] = sizes.get(number, 0) + one.nbytes
        return sizes


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Make one kernel of each run of elementwise kernels that are not between two others."""
    runs: list[tuple[list[Kernel], int]] = []
    for index, kernel in enumerate(kernels):
        if kernel.kind == "elementwise" and runs and runs[-1][0][-1].kind == "elementwise":
            runs[-1] = ([*runs[-1][0], kernel], index)
        else:
            runs.append(([kernel], index))
    return [_joined(run, kernels[last + 1 :]) for run, last in runs]


def _joined(run: list[Kernel], later: Sequence[Kernel]) -> Kernel:
    if len(run) == 1:
        return run[0]
    needed = {number for kernel in later for number in kernel.reads}
    joined, made = Kernel("elementwise"), dict[int, int]()
    for kernel in run:
        for number, size in kernel.reads.items():
            if number not in made:
                joined.reads[number] = max(size, joined.reads.get(number, 0))
        made |= {number: max(size, made.get(number, 0)) for number, size in kernel.writes.items()}
    lasting = run[-1].writes if not later else {}
    joined.writes = {number: size for number, size in made.items() if number in needed or number in lasting}
    return joined


def count(name: str) -> list[Kernel]:
    """The kernels of a middle layer of a released configuration, for a chunk that attends to three."""
    config = released_config(name)
    model, dtypes = empty_dit(config, Loading(layers=range(1, 2), device="meta"))
    state = {key: one.to("meta", dtypes[key]) for key, one in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False).fuse()
    counted = Counted()
    run = ChunkPass(model, config, 3, counted.attention)
    with counted:
        run()
    return counted.kernels


def rows(name: str) -> list[Row]:
    """Of a layer as it is, and compiled: kernels by kind, and the bytes that elementwise ones move."""
    found, plain = list[Row](), count(name)
    for way, kernels in (("as it is", plain), ("--compile", fused(plain))):
        row: Row = {"layer of": name, "run": way}
        row |= {f"{kind}s": sum(one.kind == kind for one in kernels) for kind in ("product", "attention")}
        others = [one for one in kernels if one.kind in ("elementwise", "copy")]
        found.append(row | {"other kernels": len(others), "their GB": sum(one.nbytes for one in others) / 1e9})
    return found


def main(
    configs: Annotated[list[str] | None, typer.Argument(help="Released configurations.", metavar="NAME")] = None,
) -> int:
    """Count the kernels of a layer and the bytes that its elementwise kernels move."""
    typer.echo(table([row for name in configs or ["4.5B_distill", "24B_base"] for row in rows(name)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "layer_cost"))

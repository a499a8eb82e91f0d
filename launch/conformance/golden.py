"""A golden file: what it holds, how far figures may be from it, and the comparison.

It knows the files' format, and nothing of how their figures are made again.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.errors import InputError
from models.magi.config import MagiConfig

SINGLE = 0.35
"""How far a single number may be off, in units of its tensor's root mean square."""
IN_FP8 = "in fp8 "
"""Before the name of a tensor that is made once more, with products in fp8."""
_PRODUCTS = ("tensor.output.y", "tensor_uneven.output.y", "channel.output.y")
TOLERANCES: dict[str, dict[str, float]] = {
    "generation": {"output.chunk.": 1e-4, "output.reuse_flags": 0},
    "reuse_decisions": {"output.chunk.": 1e-2, "fp32.distance": 1e-4, "fp32.sum": 1e-4, "": 0},
    "kv_selection": {"": 0},
    "vae": {"output.latent_mode.": 1e-4, "output.decoded.": 1e-2},  # the latter is stored in fp16
    "fp8_linear": {**dict.fromkeys(_PRODUCTS, 1e-4), "": 0},
    # In bf16: what is computed in fp32, after one layer, after two. Attention may round its weights to bf16.
    "forward": {
        "output.hidden.0": 1e-4,
        "output.condition": 1e-4,
        "output.null.condition": 1e-4,
        "output.text": 1e-4,
        "output.hidden.1": 5e-3,
        "": 7e-3,
    },
    "released_forward": {
        "output.embedded": 1e-4,
        "output.condition": 1e-4,
        "output.text": 1e-4,
        "output.velocity_fp32": 1e-4,
        "output.layer.0": 5.6e-3,
        "": 8.5e-3,
    },
    "wan_forward": {"": 1e-5},
    "scheduler": {"output.samples.": 1e-5, "": 0},
    "timestep_matrix": {"": 0},
    "wan_generation": {"output.latents": 1e-5, "output.rel_l1": 1e-4, "output.keep_": 1e-4, "": 0},
    "wan_generation_bf16": {"": 2e-2},  # six steps with guidance multiply what another order of sums flips
    "wan_self_forcing": {"": 1e-5},
    "wan_forward_bf16": {"output.": 6e-3, "mid.block": 6e-3, "": 1e-5},
}
"""By kind of file, and by the beginning of a tensor's name: the largest relative error (Frobenius); 0 for identical."""
ON_GPU: dict[str, dict[str, float]] = {
    "reuse_decisions": {"output.distance": 1.5e-3, "output.sum": 1.5e-3},
    "fp8_linear": {IN_FP8: 1.5e-3, **dict.fromkeys(_PRODUCTS, 5e-4)},
}
"""What is allowed in place of that on a GPU: it adds in another order, so bf16 is rounded otherwise in places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a golden file says of the engine."""

    name: str  # of the file, without its ending
    error: float  # relative error (Frobenius) of the tensor that comes closest to its tolerance, or is furthest beyond
    tolerance: float  # of that tensor
    detail: str  # what was compared, in words
    passed: bool  # whether everything agrees


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """A golden file, its tensors on the device that computes."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    device: str

    @property
    def kind(self) -> str:
        """One of `TOLERANCES`. Two publications call a kind by one name: their configurations tell them apart."""
        kind = self.metadata.get("kind", "")
        if not kind or '"model_type"' not in self.metadata.get("config", ""):
            return kind
        return f"wan_{kind}_bf16" if "precision" in self.metadata else f"wan_{kind}"

    def tensor(self, name: str, shape: Sequence[int | None] | None = None) -> Tensor:
        """A tensor, of a shape in which None stands for any number above 0; an `InputError` if there is none."""
        if name not in self.tensors:
            raise InputError(f"{self.path} lacks the tensor {name}")
        tensor = self.tensors[name]
        found = tuple(tensor.shape)
        if shape is not None and (
            len(shape) != len(found) or any(n < 1 or n != (want or n) for n, want in zip(found, shape, strict=True))
        ):
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise InputError(f"{self.path}: {name} has the shape {list(found)} and not [{wanted}]")
        return tensor

    def text(self, key: str) -> str:
        """A value of the metadata."""
        if key not in self.metadata:
            raise InputError(f"{self.path} lacks the metadata {key}")
        return self.metadata[key]

    def json(self, key: str) -> dict[str, Any]:
        """A value of the metadata that is a JSON object."""
        text = self.text(key)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: the metadata {key} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{self.path}: the metadata {key} is not a JSON object")
        return value

    def config(self) -> MagiConfig:
        """The released configuration that the case was run with."""
        return MagiConfig.from_dict(self.json("config"), source=str(self.path))

    def allowed(self, name: str) -> float:
        """The largest relative error of a tensor on the device that computes; 0 for identical."""
        on_gpu = {} if self.device == "cpu" else ON_GPU.get(self.kind, {})
        bounds = (*on_gpu.items(), *TOLERANCES[self.kind].items())
        return next(bound for start, bound in bounds if name.startswith(start))

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of their names."""
        return {key[len(prefix) :]: value for key, value in sorted(self.tensors.items()) if key.startswith(prefix)}


def read_golden(path: Path, device: str) -> Golden:
    """Read a file; an `InputError` if it cannot be read, or is of no known kind."""
    try:
        with safe_open(path, "pt", device=device) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            golden = Golden(path=path, metadata=file.metadata() or {}, tensors=tensors, device=device)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the golden file {path}: {error}") from None
    if golden.kind not in TOLERANCES:
        raise InputError(f"{path} has kind {golden.kind!r}: known kinds are {', '.join(TOLERANCES)}")
    return golden


def without_weights(files: Sequence[Path]) -> list[Path]:
    """The files but those of weights, which lie beside the cases that use them; all if there is nothing else."""
    kept = [path for path in files if not _holds_weights(path)]
    return kept or list(files)


def _holds_weights(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("kind") == "weights"
    except (OSError, SafetensorError):
        return False  # which is said where it is read


def compare(golden: Golden, made: Iterable[tuple[str, Tensor]]) -> Verdict:
    """Compare figures with the file's, by the names of its tensors, which `IN_FP8` may stand before."""
    worst, error, tolerance = -1.0, 0.0, 0.0
    wrong, equal, count, in_fp8 = [], 0, 0, 0
    for name, tensor in made:
        count += 1
        in_fp8 += name.startswith(IN_FP8)
        expected, bound = golden.tensor(name.removeprefix(IN_FP8)), golden.allowed(name)
        if not bound:
            equal += (same := identical(tensor, expected))
            if not same:
                wrong.append(f"{name} differs")
            continue
        off = relative_error(tensor, expected)
        if not (off <= bound and largest_error(tensor, expected) <= SINGLE):
            wrong.append(f"{name} is off by {off:.1e}, {bound:g} allowed")
        if off / bound > worst:
            worst, error, tolerance = off / bound, off, bound
    counts = {"comparisons": count, "identical": equal, "in fp8": in_fp8}
    said = "; ".join([", ".join(f"{number} {what}" for what, number in counts.items() if number), *wrong])
    name, passed = golden.path.stem, not wrong
    return Verdict(name=name, error=error, tolerance=tolerance, detail=said, passed=passed)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected; infinite for a wrong shape or a NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    expected, actual = _finite(expected, actual)
    error = ((actual - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, over the root mean square of what is expected."""
    expected, actual = _finite(expected, actual)
    return ((actual - expected).abs().max() / expected.square().mean().sqrt()).item()


def identical(actual: Tensor, expected: Tensor) -> bool:
    """All numbers are the same, and NaN where NaN is expected."""
    if actual.shape != expected.shape:
        return False
    actual, expected = actual.to(expected.device).double(), expected.double()
    return bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())


def _finite(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """In double precision, without the places that are NaN in both."""
    expected, actual = expected.double(), actual.to(expected.device).double()
    kept = ~(expected.isnan() & actual.isnan())
    return expected[kept], actual[kept]

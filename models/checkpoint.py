"""Weights from files, one tensor at a time and only those that are needed: safetensors, or one file of PyTorch's own.

It also finds the parts of a model in folders as they are downloaded. A file's header is checked before anything is
read from it, so a wrong, incomplete or truncated checkpoint is reported by file and tensor before memory is spent.
Nothing here knows a family of models, or ranks.
"""

import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.config import read_json
from models.errors import InputError

_Network = TypeVar("_Network", bound=nn.Module)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_SUFFIXES = (".pt", ".pth")
_FP8 = "F8_E4M3"
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FLOATING = (*_KINDS.values(), _FP8)
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_SHOWN = 3  # names in an error message


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How to load a model."""

    device: str = "cpu"  # where to put it
    precise: bool = True  # fp32 output projections, as released; False is the `fast` precision
    compiled: bool = False  # few kernels besides attention, where a family can
    attention: str = "sdpa"  # name of the attention backend
    layers: range | None = None  # which layers of the DiT to load; None for all


WHOLE = Loading()


class Stored(NamedTuple):
    """What a safetensors file says about one of its tensors."""

    path: Path  # of the file
    shape: tuple[int, ...]
    dtype: str  # as the format writes it, such as BF16
    start: int  # first byte of the file's data
    end: int  # the one after its last

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


class WeightFiles:
    """The stored weights of one network. Nothing is read before it is asked for.

    Args:
        source: a folder that holds `model.safetensors.index.json` and its shards, or `model.safetensors`; or one
            safetensors file.
        stem: how these files begin, in place of `model`.
    """

    def __init__(self, source: Path, *, stem: str = "model") -> None:
        self.source, self._index, self._single = source, source / f"{stem}.safetensors.index.json", source
        if source.suffix != ".safetensors":
            self._single = source / f"{stem}.safetensors"

    def stored(self) -> dict[str, Stored]:
        """All tensors, from the headers of the files; an `InputError` if one is missing or damaged."""
        return self._locate(self._files(), all_used=False)

    def _files(self) -> dict[str, Path]:
        """Which file holds each tensor."""
        if self._index.is_file():
            return _read_index(self._index)
        path = self._single
        if path != self.source and not path.exists() and not _packed(path).is_file():
            raise InputError(
                f"no weights in {self.source}: it needs {self._index.name} with its shards, or {path.name}"
            )
        return dict.fromkeys(_read_header(path), path)

    def fill(
        self,
        model: _Network,
        dtypes: Mapping[str, torch.dtype],
        device: str,
        *,
        all_used: bool,
        stored_as: Callable[[str], str] = str,
    ) -> _Network:
        """Give a network on the meta device its tensors, in these dtypes, from where they are `stored_as`. An
        `InputError` if a file is missing, damaged or truncated, or a tensor is missing, of a wrong shape or kind, or,
        if `all_used`, left over."""
        found = self.fitting(model, dtypes, all_used=all_used, stored_as=stored_as)
        tensors = self._read(found, device, {stored_as(name): dtype for name, dtype in dtypes.items()})
        model.load_state_dict({name: tensors[stored_as(name)] for name in dtypes}, assign=True)
        return model.requires_grad_(False).eval()

    def fitting(
        self,
        model: nn.Module,
        dtypes: Mapping[str, torch.dtype],
        *,
        all_used: bool,
        stored_as: Callable[[str], str] = str,
    ) -> dict[str, Stored]:
        """The stored tensors of a network on the meta device, seen to be of its shapes and kinds, by stored names."""
        found = self._locate([stored_as(name) for name in dtypes], all_used=all_used)
        for key, declared in model.state_dict().items():
            name = stored_as(key)
            entry, quantised = found[name], dtypes[key] == torch.float8_e4m3fn
            shape, needed = list(declared.shape), _FP8 if quantised else "an unquantised dtype"
            if list(entry.shape) != shape:
                raise InputError(f"{entry.path}: {name} has shape {list(entry.shape)}, but the model needs {shape}")
            if entry.dtype not in _FLOATING:
                raise InputError(f"{entry.path}: {name} is {entry.dtype}: weights are floating-point numbers")
            if (entry.dtype == _FP8) != quantised:
                raise InputError(f"{entry.path}: {name} is {entry.dtype}, but the configuration asks for {needed}")
        return found

    def _locate(self, names: Collection[str], *, all_used: bool) -> dict[str, Stored]:
        """Find tensors in a folder or a file. Only files that hold one of them are opened."""
        files, index = self._files(), self._index
        _check_names(index if index.is_file() else self._single, names, files, all_used=all_used)
        headers = {path: _read_header(path) for path in sorted({files[name] for name in names})}
        for name in names:
            if name not in headers[files[name]]:
                raise InputError(f"{files[name]} lacks {name}, which {index} says it holds")
        return {name: headers[files[name]][name] for name in names}

    def _read(self, found: Mapping[str, Stored], device: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Read tensors, file by file; each is converted before the next is read."""
        tensors = {}
        for path in sorted({entry.path for entry in found.values()}):
            for name, stored in _tensors(path, [name for name, entry in found.items() if entry.path == path], device):
                tensors[name] = stored.to(dtypes[name])
        return tensors


class TorchFile(WeightFiles):
    """Weights in one file that PyTorch has written, a dictionary of tensors. Nothing that is in it is run.

    Args:
        source: the file.
        within: where the dictionary is, if it is in another: the first of these keys that is there.
        prefix: of the names in it, which is left out.
        convert: what makes the tensors that are wanted of those that are stored, without copies.
    """

    def __init__(
        self,
        source: Path,
        *,
        within: Sequence[str] = (),
        prefix: str = "",
        convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:
        super().__init__(source)
        self._within, self._prefix, self._convert = within, prefix, convert

    def stored(self) -> dict[str, Stored]:
        """All tensors; an `InputError` if the file cannot be read, or holds anything else."""
        return {
            name: Stored(
                self.source, tuple(tensor.shape), _KINDS.get(tensor.dtype, str(tensor.dtype)), 0, tensor.nbytes
            )
            for name, tensor in self._held.items()
        }

    @cached_property
    def _held(self) -> dict[str, Tensor]:
        path, values = self.source, _load_torch(self.source)
        if isinstance(values, dict):
            values = next((values[key] for key in self._within if key in values), values)
        if not isinstance(values, dict) or not values:
            raise InputError(f"{path} holds no dictionary of tensors")
        for name, tensor in values.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise InputError(f"{path}: {name} is {type(tensor).__name__} and no tensor: it is refused")
        return self._convert({name.removeprefix(self._prefix): tensor for name, tensor in values.items()})

    def _locate(self, names: Collection[str], *, all_used: bool) -> dict[str, Stored]:
        stored = self.stored()
        _check_names(self.source, names, stored.keys(), all_used=all_used)
        return {name: stored[name] for name in names}

    def _read(self, found: Mapping[str, Stored], device: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        tensors = {}
        for name in found:
            _check_numbers(self.source, name, stored := self._held[name])
            tensors[name] = stored.to(device=device, dtype=dtypes[name], copy=True)
        return tensors


def read_through(found: Mapping[str, Stored]) -> Iterator[str]:
    """Read tensors one by one, and see that their values are numbers; yields the name of each when it is through. An
    `InputError` if a file cannot be read, or a value is not a finite number."""
    for path in sorted({entry.path for entry in found.values()}):
        if path.suffix in TORCH_SUFFIXES:
            for name, tensor in _flat(_load_torch(path)):
                _check_numbers(path, name, tensor)
                yield name
            continue
        for name, _ in _tensors(path, [name for name, entry in found.items() if entry.path == path], "cpu"):
            yield name


def first_with(folders: Sequence[Path], holds: str, what: str, missing: list[str]) -> Path | None:
    """The first folder that holds something of that name; if there is none, `missing` gets a line with the places."""
    for folder in folders:
        if (folder / holds).exists():
            return folder
    # Of the many folders around, those that exist are where somebody would put it.
    places = [folder for folder in folders if folder.parent.is_dir()] or list(folders)
    missing.append(f"no {what} in {', '.join(dict.fromkeys(str(place) for place in places))}")
    return None


def shape_of(stored: Mapping[str, Stored], wrong: str, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that has so many dimensions, none of them 0; else an `InputError`, which `wrong` begins."""
    found = stored[name].shape if name in stored else ()
    if len(found) != dimensions or not all(found):
        raise InputError(f"{wrong}: it lacks {name}")
    return found


def _load_torch(path: Path) -> Any:
    """What is in a file of PyTorch; an `InputError` if that is not tensors and plain values, or is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise InputError(_unreadable(path, error.strerror or str(error))) from None
    except UnpicklingError:
        raise InputError(f"{path} holds something else than tensors, and is refused") from None
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is no complete file of PyTorch: {reason}; download it again") from None


def _flat(values: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of dictionaries in each other."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, Tensor):
            yield str(name), value
        else:
            yield from _flat(value)


def _check_names(where: Path, names: Collection[str], held: Collection[str], *, all_used: bool) -> None:
    if missing := sorted(set(names) - set(held)):
        raise InputError(f"{where} lacks {_listed(missing)}: the checkpoint does not fit the configuration")
    if all_used and (extra := sorted(set(held) - set(names))):
        raise InputError(f"{where} has {_listed(extra)} that the model does not: another configuration's checkpoint?")


def _check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    if not _finite(tensor):
        raise InputError(f"{path}: {name} holds values that are not numbers, or are infinite")


def _tensors(path: Path, names: Iterable[str], device: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file, one at a time, with values that are numbers."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            for name in names:
                stored = file.get_tensor(name)
                _check_numbers(path, name, stored)
                yield name, stored
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _finite(tensor: Tensor) -> bool:
    """All values are numbers. The fp8 of checkpoints knows no infinity, and one NaN for each sign."""
    if not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return not (tensor.view(torch.uint8) & 0x7F).eq(0x7F).any()
    low, high = tensor.aminmax()  # NaN if one is, and no copy of the tensor
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _read_index(path: Path) -> dict[str, Path]:
    """Tensor names and the shards that hold them."""
    shards = read_json(path, "the checkpoint's index").get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError(f"{path}: the object weight_map is missing or maps to something else than file names")
    return {name: path.parent / shard for name, shard in shards.items()}


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, and the tensors' bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = file.read(length) if length <= min(_MAX_HEADER, size) else b""
    except OSError as error:
        raise InputError(_unreadable(path, error.strerror or str(error))) from None
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        tensors = {
            name: Stored(path, tuple(map(int, entry["shape"])), str(entry["dtype"]), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is not a complete safetensors file ({size:,} bytes): download it again") from None
    data = size - 8 - length
    # In the order of the bytes, so that the first bad tensor is the one where the file ends.
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].end):
        if entry.end > data:
            short = max(last.end for last in tensors.values()) - data
            raise InputError(f"{path} is truncated: it lacks {short:,} bytes, from {name} on; download it again")
    return tensors


def _packed(path: Path) -> Path:
    return path.with_name(path.name + ".zst")


def _unreadable(path: Path, reason: str) -> str:
    packed = _packed(path)
    if packed.is_file():
        return f"{packed} is compressed: unpack it with zstd -d {packed}"
    return f"cannot read the weights {path}: {reason}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

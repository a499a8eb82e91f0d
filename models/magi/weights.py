"""Weights of MAGI-1 from safetensors files, one tensor at a time and only those that are needed (specification part 5).

A file's header is checked before anything is read from it, so a wrong, incomplete or truncated checkpoint is reported
by file and tensor before memory is spent. Nothing here knows ranks; which layers to read is passed in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig, read_json
from models.magi.dit import MagiDiT
from models.magi.vae import ViTVAE
from models.protocols import CELL_FRAMES, CELL_PIXELS

_Network = TypeVar("_Network", bound=nn.Module)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FP8 = "F8_E4M3"
_FLOATING = ("F64", "F32", "F16", "BF16", _FP8)
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_SHOWN = 3  # names in an error message

_PROMOTED_PARTS = ("x_embedder.", "y_embedder.", "t_embedder.", "final_linear.", "rope.")
_PROMOTED_NORMS = re.compile(r"\.([qk]_layernorm|self_attn_post_norm|mlp_post_norm|final_layernorm)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How to load a model."""

    device: str = "cpu"  # where to put it
    precise: bool = True  # fp32 output projections, as released; False is the `fast` precision
    compiled: bool = False  # few kernels besides attention
    attention: str = "sdpa"  # name of the attention backend
    layers: range | None = None  # which layers of the DiT to load; None for all


_WHOLE = Loading()


class Stored(NamedTuple):
    """What a safetensors file says about one of its tensors."""

    path: Path  # of the file
    shape: tuple[int, ...]
    dtype: str  # as the format writes it, such as BF16
    start: int  # first byte of the file's data
    end: int  # the one after its last


class Checkpoint:
    """The stored weights of one network. Nothing is read before it is asked for.

    Args:
        source: a folder that holds `model.safetensors.index.json` and its shards, or `model.safetensors`; a released
            autoencoder's folder, with `config.json` and `diffusion_pytorch_model.safetensors`; or one safetensors file.
    """

    def __init__(self, source: Path) -> None:
        self.source = source

    def dit(self, config: MagiConfig, loading: Loading = _WHOLE) -> MagiDiT:
        """Build the DiT, or the stage with the layers that are asked for, from its own tensors.

        What the released code promotes is fp32 (5.5), fp8 weights and their scales stay as they are, and everything
        else gets the model's dtype, in whichever of the two a checkpoint stores its norms.

        Returns:
            The model, ready to infer with: without gradients, in evaluation mode. Of a whole one, no tensor of the
            checkpoint may be left over.

        Raises:
            InputError: a file is missing, damaged or truncated, or a tensor is missing, too many, or of a wrong shape
                or kind.
        """
        model, dtypes = empty_dit(config, loading)
        return self._fill(model, dtypes, loading.device, all_used=loading.layers is None).fuse()

    def check_dit(self, config: MagiConfig) -> dict[str, Stored]:
        """The tensors of a whole DiT, seen to fit the configuration by their headers; errors as in `dit`."""
        model, dtypes = empty_dit(config, _WHOLE)
        return self._fitting(model, dtypes, all_used=True)

    def stored(self) -> dict[str, Stored]:
        """All tensors, from the headers of the files; an `InputError` if one is missing or damaged."""
        index = self.source / INDEX
        names = _read_index(index) if index.is_file() else _read_header(self._single())
        return self._locate(names, all_used=False)

    def vae(self, *, dtype: torch.dtype, device: str = "cpu") -> ViTVAE:
        """Build the autoencoder of a released folder (1.1), all in one `dtype`, whatever is stored.

        Raises:
            InputError: as in `dit`; also a description of another class of autoencoder.
        """
        vae = self._empty_vae()
        weights = Checkpoint(self.source / _VAE_WEIGHTS)
        return weights._fill(vae, dict.fromkeys(vae.state_dict(), dtype), device, all_used=True)

    def check_vae(self) -> dict[str, Stored]:
        """The tensors of an autoencoder, seen to fit its description; errors as in `vae`."""
        vae = self._empty_vae()
        weights = Checkpoint(self.source / _VAE_WEIGHTS)
        return weights._fitting(vae, dict.fromkeys(vae.state_dict(), torch.float32), all_used=True)

    def vae_config(self) -> VaeConfig:
        """The description of an autoencoder; errors as in `vae`."""
        path = self.source / "config.json"
        values = read_json(path, "the autoencoder's configuration")
        for key, known in {"_class_name": "ViTVAE", "model_type": "vit"}.items():
            if values.get(key) != known:
                raise InputError(f"{path}: {key} is {values.get(key)!r}, but only {known!r} is known")
        if not isinstance(values.get("ddconfig"), dict):
            raise InputError(f"{path}: the object ddconfig is missing")
        config = VaeConfig.from_dict(values["ddconfig"], source=str(path))
        if (config.patch_size, config.patch_length) != (CELL_PIXELS, CELL_FRAMES):
            raise InputError(f"{path}: patch_size must be {CELL_PIXELS} and patch_length {CELL_FRAMES}")
        return config

    def _empty_vae(self) -> ViTVAE:
        with torch.device("meta"):
            return ViTVAE(self.vae_config())

    def _fill(self, model: _Network, dtypes: Mapping[str, torch.dtype], device: str, *, all_used: bool) -> _Network:
        """Give a network on the meta device its tensors, in these dtypes."""
        found = self._fitting(model, dtypes, all_used=all_used)
        model.load_state_dict(_read(found, device, dtypes), assign=True)
        return model.requires_grad_(False).eval()

    def _fitting(self, model: nn.Module, dtypes: Mapping[str, torch.dtype], *, all_used: bool) -> dict[str, Stored]:
        """The stored tensors of a network on the meta device, seen to be of its shapes and kinds."""
        found = self._locate(dtypes, all_used=all_used)
        for name, declared in model.state_dict().items():
            entry, quantised = found[name], dtypes[name] == torch.float8_e4m3fn
            shape, needed = list(declared.shape), _FP8 if quantised else "an unquantised dtype"
            if list(entry.shape) != shape:
                raise InputError(f"{entry.path}: {name} has shape {list(entry.shape)}, but the model needs {shape}")
            if entry.dtype not in _FLOATING:
                raise InputError(f"{entry.path}: {name} is {entry.dtype}: weights are floating-point numbers")
            if (entry.dtype == _FP8) != quantised:
                raise InputError(f"{entry.path}: {name} is {entry.dtype}, but the configuration asks for {needed}")
        return found

    def _single(self) -> Path:
        return self.source if self.source.suffix == ".safetensors" else self.source / SINGLE

    def _locate(self, names: Collection[str], *, all_used: bool) -> dict[str, Stored]:
        """Find tensors in a folder or a file. Only files that hold one of them are opened."""
        index = self.source / INDEX
        if index.is_file():
            shards = _read_index(index)
            where, held = index, set(shards)
        else:
            where = self._single()
            shards = {}
            held = set(_read_header(where))
        if missing := sorted(set(names) - held):
            raise InputError(f"{where} lacks {_listed(missing)}: the checkpoint does not fit the configuration")
        if all_used and (extra := sorted(held - set(names))):
            raise InputError(
                f"{where} has {_listed(extra)} that the model does not: another configuration's checkpoint?"
            )
        headers = {path: _read_header(path) for path in sorted({shards.get(name, where) for name in names})}
        found = {}
        for name in names:
            path = shards.get(name, where)
            if name not in headers[path]:
                raise InputError(f"{path} lacks {name}, which {index} says it holds")
            found[name] = headers[path][name]
        return found


def dit_dtype(name: str, declared: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter is used in; `dtype` is the model's."""
    if declared.dtype == torch.float8_e4m3fn:
        return declared.dtype
    promoted = name.startswith(_PROMOTED_PARTS) or _PROMOTED_NORMS.search(name) or name.endswith("_scale")
    return torch.float32 if promoted else dtype


@cache  # a batch asks once for each of its lines
def stage_bytes(config: MagiConfig, layers: range) -> int:
    """Bytes that the DiT with these layers takes once it is loaded."""
    model, dtypes = empty_dit(config, Loading(layers=layers))
    return sum(tensor.numel() * dtypes[name].itemsize for name, tensor in model.state_dict().items())


@cache
def vae_parameters(config: VaeConfig) -> int:
    """Parameters of an autoencoder."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in ViTVAE(config).state_dict().values())


def empty_dit(config: MagiConfig, loading: Loading) -> tuple[MagiDiT, dict[str, torch.dtype]]:
    """A DiT on the meta device, and the dtypes that its parameters are used in."""
    shapes, fp8 = config.model_config, config.engine_config.fp8_quant
    with torch.device("meta"):
        how = {"precise": loading.precise, "compiled": loading.compiled}
        model = MagiDiT(shapes, layers=loading.layers, fp8=fp8, attention=loading.attention, **how)
    return model, {name: dit_dtype(name, tensor, shapes.dtype) for name, tensor in model.state_dict().items()}


def read_through(found: Mapping[str, Stored]) -> Iterator[str]:
    """Read tensors one by one, and see that their values are numbers; yields the name of each when it is through.

    Raises:
        InputError: a file cannot be read, or a value is not a finite number.
    """
    for path in sorted({entry.path for entry in found.values()}):
        for name, _ in _tensors(path, [name for name, entry in found.items() if entry.path == path], "cpu"):
            yield name


def _read(found: Mapping[str, Stored], device: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Read tensors, file by file; each is converted before the next is read."""
    tensors = {}
    for path in sorted({entry.path for entry in found.values()}):
        for name, stored in _tensors(path, [name for name, entry in found.items() if entry.path == path], device):
            tensors[name] = stored.to(dtypes[name])
    return tensors


def _tensors(path: Path, names: Iterable[str], device: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file, one at a time, with values that are numbers."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            for name in names:
                stored = file.get_tensor(name)
                if not _finite(stored):
                    raise InputError(f"{path}: {name} holds values that are not numbers, or are infinite")
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


def _unreadable(path: Path, reason: str) -> str:
    packed = path.with_name(path.name + ".zst")
    if packed.is_file():
        return f"{packed} is compressed: unpack it with zstd -d {packed}"
    if path.name == SINGLE and not path.exists():
        return f"no weights in {path.parent}: it needs {INDEX} with its shards, or {SINGLE}"
    return f"cannot read the weights {path}: {reason}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

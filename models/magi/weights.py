"""Reading weights from safetensors files, one tensor at a time and only those that are needed (specification part 5).

A file's header is checked before anything is read from it, so a wrong, incomplete or truncated checkpoint is reported
by file and tensor before memory is spent. The module knows no ranks; which layers to read is passed in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.vae import ViTVAE

_Model = TypeVar("_Model", bound=nn.Module)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FP8 = "F8_E4M3"
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_SHOWN = 3  # names in an error message

_PROMOTED_PARTS = ("x_embedder.", "y_embedder.", "t_embedder.", "final_linear.", "rope.")
_PROMOTED_NORMS = re.compile(r"\.([qk]_layernorm|self_attn_post_norm|mlp_post_norm|final_layernorm)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """What a safetensors file says about one of its tensors."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def weights_folder(config: MagiConfig, load: Path) -> Path:
    """The folder of the DiT's weights inside `runtime_config.load` (5.1)."""
    kind = (".fp8" if config.engine_config.fp8_quant else "") + (".distill" if config.engine_config.distill else "")
    return load / f"inference_weight{kind}"


def load_tensors(folder: Path, names: Collection[str], *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read these tensors, as stored, from only the files that hold them.

    Args:
        folder: holds `model.safetensors.index.json` and its shards, or `model.safetensors`; or one safetensors file.
        names: what to read.
        device: where to put them.

    Raises:
        InputError: a file is missing, damaged or truncated, or a tensor is not there.
    """
    return dict(_read(_locate(folder, names), device))


def load_dit(
    config: MagiConfig,
    folder: Path,
    *,
    layers: range | None = None,
    precise: bool = True,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> MagiDiT:
    """Build the DiT, or the stage with these layers, from its own tensors.

    What the released code promotes is fp32 (5.5), fp8 weights and their scales stay as they are, and everything else
    gets the model's dtype, in whichever of the two a checkpoint stores its norms.

    Args:
        config: shapes, and whether the checkpoint is quantised.
        folder: as in `load_tensors`.
        layers: which layers to hold. Without it, no tensor of the checkpoint may be left over.
        precise: see `MagiDiT`.
        attention: see `MagiDiT`.
        device: where to put the weights.

    Returns:
        The model, ready to infer with: without gradients, in evaluation mode.

    Raises:
        InputError: as in `load_tensors`; also a tensor too many, or of a wrong shape or kind.
    """
    shapes = config.model_config
    with torch.device("meta"):
        fp8 = config.engine_config.fp8_quant
        model = MagiDiT(shapes, layers=layers, fp8=fp8, precise=precise, attention=attention)
    dtypes = {name: _dit_dtype(name, tensor, shapes.dtype) for name, tensor in model.state_dict().items()}
    found = _locate(folder, dtypes, all_used=layers is None)
    return _fill(model, found, dtypes, device)


def load_vae(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> ViTVAE:
    """Build the autoencoder from a released folder: config.json and diffusion_pytorch_model.safetensors (1.1).

    Args:
        folder: `vae_pretrained`.
        dtype: dtype of all parameters; the released one is bf16, whatever is stored.
        device: where to put the weights.

    Raises:
        InputError: a file is missing or damaged, or describes another class of autoencoder.
    """
    path = folder / "config.json"
    values = _read_json(path, "the autoencoder's configuration")
    for key, known in {"_class_name": "ViTVAE", "model_type": "vit"}.items():
        if values.get(key) != known:
            raise InputError(f"{path}: {key} is {values.get(key)!r}, but only {known!r} is known")
    if not isinstance(values.get("ddconfig"), dict):
        raise InputError(f"{path}: the object ddconfig is missing")
    config = VaeConfig.from_dict(values["ddconfig"], source=str(path))
    return load_vae_weights(config, folder / _VAE_WEIGHTS, dtype=dtype, device=device)


def load_vae_weights(
    config: VaeConfig, path: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> ViTVAE:
    """Build the autoencoder from one safetensors file; see `load_vae`."""
    with torch.device("meta"):
        vae = ViTVAE(config)
    dtypes = dict.fromkeys(vae.state_dict(), dtype)
    return _fill(vae, _locate(path, dtypes, all_used=True), dtypes, device)


def _dit_dtype(name: str, declared: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter is used in; `dtype` is the model's."""
    if declared.dtype == torch.float8_e4m3fn:
        return declared.dtype
    promoted = name.startswith(_PROMOTED_PARTS) or _PROMOTED_NORMS.search(name) or name.endswith("_scale")
    return torch.float32 if promoted else dtype


def _fill(
    model: _Model, found: Mapping[str, TensorFile], dtypes: Mapping[str, torch.dtype], device: torch.device | str
) -> _Model:
    for name, declared in model.state_dict().items():
        entry, shape = found[name], tuple(declared.shape)
        if entry.shape != shape:
            raise InputError(f"{entry.path}: {name} has shape {list(entry.shape)}, but the model needs {list(shape)}")
        if (entry.dtype == _FP8) != (dtypes[name] == torch.float8_e4m3fn):
            needed = _FP8 if dtypes[name] == torch.float8_e4m3fn else "an unquantised dtype"
            raise InputError(f"{entry.path}: {name} is {entry.dtype}, but the configuration asks for {needed}")
    tensors = {name: tensor.to(dtypes[name]) for name, tensor in _read(found, device)}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def _locate(source: Path, names: Collection[str], *, all_used: bool = False) -> dict[str, TensorFile]:
    """Find tensors in a folder or a file. Only files that hold one of them are opened."""
    index = source / _INDEX
    if index.is_file():
        shards = _read_index(index)
        where, held = index, set(shards)
    else:
        where = source / _SINGLE if source.suffix != ".safetensors" else source
        shards = {}
        held = set(_read_header(where))
    if missing := sorted(set(names) - held):
        raise InputError(f"{where} lacks {_listed(missing)}: the checkpoint does not fit the configuration")
    if all_used and (extra := sorted(held - set(names))):
        raise InputError(f"{where} has {_listed(extra)} that the model does not: another configuration's checkpoint?")
    headers = {path: _read_header(path) for path in sorted({shards.get(name, where) for name in names})}
    found = {}
    for name in names:
        path = shards.get(name, where)
        if name not in headers[path]:
            raise InputError(f"{path} lacks {name}, which {index} says it holds")
        found[name] = headers[path][name]
    return found


def _read(found: Mapping[str, TensorFile], device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[Path, list[str]] = {}
    for name, entry in found.items():
        by_file.setdefault(entry.path, []).append(name)
    for path, names in by_file.items():
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot read {path}: {error}") from None


def _read_index(path: Path) -> dict[str, Path]:
    """Tensor names and the shards that hold them."""
    shards = _read_json(path, "the checkpoint's index").get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError(f"{path}: the object weight_map is missing or maps to something else than file names")
    return {name: path.parent / shard for name, shard in shards.items()}


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a JSON object")
    return values


def _read_header(path: Path) -> dict[str, TensorFile]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, and the tensors' bytes.

    Raises:
        InputError: the file is missing or no safetensors file, or ends before its last tensor does.
    """
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
        spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in header.items()}
        tensors = {
            name: TensorFile(path=path, shape=tuple(entry["shape"]), dtype=entry["dtype"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a complete safetensors file ({size:,} bytes): download it again") from None
    data = size - 8 - length
    # In the order of the bytes, so that the first bad tensor is the one where the file ends.
    for name, (_, end) in sorted(spans.items(), key=lambda item: item[1]):
        if end > data:
            short = max(last for _, last in spans.values()) - data
            raise InputError(f"{path} is truncated: it lacks {short:,} bytes, from {name} on; download it again")
    return tensors


def _unreadable(path: Path, reason: str) -> str:
    packed = path.with_name(path.name + ".zst")
    if packed.is_file():
        return f"{packed} is compressed: unpack it with zstd -d {packed}"
    if path.name == _SINGLE and not path.exists():
        return f"no weights in {path.parent}: it needs {_INDEX} with its shards, or {_SINGLE}"
    return f"cannot read the weights {path}: {reason}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

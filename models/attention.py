"""Attention behind one function, with three backends that compute the same thing.

Where a kernel takes grouped heads it gets them. Elsewhere query heads are folded into the query rows, so keys and
values are never copied; that is exact because nothing here is causal: every query row attends to all key rows that it
is given. The module knows no chunks and no caches.

Shapes: B batch, S query rows, K key rows, H query heads, G key heads, d head size.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import InputError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, S, H, d], k [B, K, G, d], v [B, K, G, d]) -> [B, S, H, d]; H is a multiple of G, scale 1/sqrt(d)."""


def _fold_groups(q: Tensor, key_heads: int) -> Tensor:
    """[B, S, H, d] -> [B, S * H/G, G, d]: query head m belongs to key head m // (H/G)."""
    b, s, h, d = q.shape
    return q.reshape(b, s, key_heads, h // key_heads, d).transpose(2, 3).reshape(b, -1, key_heads, d)


def _unfold_groups(o: Tensor, rows: int) -> Tensor:
    """The inverse of `_fold_groups`."""
    b, _, g, d = o.shape
    return o.reshape(b, rows, -1, g, d).transpose(2, 3).reshape(b, rows, -1, d)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if _takes_groups(q.device, q.dtype, q.shape[-1]):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    return folded(q, k, v)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA for kernels that take no groups: `Attention` with query heads folded into rows."""
    rows = _fold_groups(q, k.shape[2]).transpose(1, 2)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return _unfold_groups(out.transpose(1, 2), q.shape[1])


@cache
def _takes_groups(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether PyTorch has kernels for grouped heads: cuDNN's, and flash attention 2. Without, it would hold all scores.

    They are for GPUs from Ampere on and 16 bits. The memory-efficient kernel, the only one for fp32, takes none.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_size % 8 or head_size > 128:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flash = importlib.import_module("flash_attn")
    return flash.flash_attn_func(q, k, v)  # takes grouped heads as they are


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    return _unfold_groups(ops.memory_efficient_attention(_fold_groups(q, k.shape[2]), k, v), q.shape[1])


BACKENDS: dict[str, Attention] = {"sdpa": _sdpa, "flash-attn": _flash, "xformers": _xformers}
_PACKAGES = {"flash-attn": "flash_attn", "xformers": "xformers"}


def available_backends() -> list[str]:
    """The names that `attention_backend` can give on this machine."""
    found = [name for name, package in _PACKAGES.items() if importlib.util.find_spec(package)]
    return ["sdpa", *(found if torch.cuda.is_available() else [])]


def backend_name(name: str) -> str:
    """What a name stands for: "auto" is SDPA, which by itself takes what is fastest for a device, dtype, head size and
    length: on an H200 that is cuDNN, 1.6 times as fast as flash attention 2 (docs/performance.md)."""
    return "sdpa" if name == "auto" else name


def attention_backend(name: str = "sdpa", dtype: torch.dtype | None = None) -> Attention:
    """The attention function of a name, or of "auto", for a model of that dtype. An `InputError` if the name is
    unknown, its package or a GPU is missing, or it has no kernels for the dtype."""
    name = backend_name(name)
    if name not in BACKENDS:
        raise InputError(f"unknown attention backend {name!r}: choose from auto, {', '.join(BACKENDS)}")
    if name not in available_backends():
        package = _PACKAGES[name]
        missing = f"package {package} is" if not importlib.util.find_spec(package) else "a CUDA GPU is"
        raise InputError(f"attention backend {name!r} was asked for, but {missing} missing: "
                         f"pip install 'flowcache-engine[gpu]' on a GPU machine, or use sdpa")  # fmt: skip
    if name != "sdpa" and dtype == torch.float32:
        raise InputError(f"attention backend {name!r} has no kernels for an fp32 model: use sdpa")
    return BACKENDS[name]

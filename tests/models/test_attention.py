"""Attention backends against attention written out, and what they may not do: copy keys."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.attention import BACKENDS, attention_backend, available_backends
from models.errors import InputError


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention head by head: query head m uses key head m // (H/G)."""
    heads, groups = q.shape[2], k.shape[2]
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for m in range(heads):
            g = m // (heads // groups)
            scores = q[b, :, m].double() @ k[b, :, g].double().T / q.shape[-1] ** 0.5
            out[b, :, m] = (scores.softmax(-1) @ v[b, :, g].double()).to(q.dtype)
    return out


def inputs(b: int, s: int, keys: int, heads: int, groups: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(s + keys)
    q = torch.randn(b, s, heads, d, generator=generator)
    k = torch.randn(b, keys, groups, d, generator=generator)
    v = torch.randn(b, keys, groups, d, generator=generator)
    return q, k, v


CASES = [pytest.param(name, marks=[] if name == "sdpa" else pytest.mark.gpu) for name in available_backends()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("groups", [8, 4, 2, 1])
@pytest.mark.parametrize(("rows", "keys"), [(1, 7), (13, 13), (6, 40), (40, 3)])
def test_backend_equals_plain_softmax(name: str, groups: int, rows: int, keys: int) -> None:
    q, k, v = inputs(2, rows, keys, 8, groups, 16)
    if name == "sdpa":
        out = attention_backend(name)(q, k, v)
        assert out.shape == q.shape
        torch.testing.assert_close(out, plain(q, k, v))
    else:  # the GPU packages have no fp32 kernels
        q, k, v = (x.to("cuda", torch.bfloat16) for x in (q, k, v))
        torch.testing.assert_close(attention_backend(name)(q, k, v), plain(q, k, v), rtol=2e-2, atol=1e-2)


def test_key_slices_of_a_larger_buffer_are_attended_as_they_are() -> None:
    q, k, v = inputs(1, 5, 30, 4, 2, 16)
    part = slice(7, 21)
    expected = plain(q, k[:, part].clone(), v[:, part].clone())
    torch.testing.assert_close(attention_backend()(q, k[:, part], v[:, part]), expected)


def allocated(work: Callable[[], Tensor]) -> int:
    """Bytes that a computation allocates, inside the kernels too."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    return sum(max(0, event.self_cpu_memory_usage) for event in record.events())


def test_grouped_keys_are_not_copied() -> None:
    q, k, v = inputs(1, 4, 8192, 8, 2, 64)
    copies = allocated(lambda: attention_backend()(q, k.repeat_interleave(4, dim=2), v.repeat_interleave(4, dim=2)))
    assert copies > 8 * k.nbytes  # what it would cost
    assert 0 < allocated(lambda: attention_backend()(q, k, v)) < k.nbytes / 4


def test_sdpa_is_always_there_and_auto_gives_something_that_runs() -> None:
    assert available_backends()[0] == "sdpa"
    assert attention_backend("auto") is BACKENDS["sdpa"]
    assert attention_backend("auto", torch.float32) is attention_backend("sdpa", torch.float32)


def test_an_unknown_backend_is_reported() -> None:
    with pytest.raises(InputError, match="unknown attention backend 'flash': choose from auto, sdpa, flash-attn"):
        attention_backend("flash")


@pytest.mark.parametrize(("name", "package"), [("flash-attn", "flash_attn"), ("xformers", "xformers")])
def test_a_backend_that_cannot_run_here_says_what_is_missing(name: str, package: str) -> None:
    if name in available_backends():
        pytest.skip(f"{name} can run here")
    missing = "a CUDA GPU is missing" if importlib.util.find_spec(package) else f"package {package} is missing"
    with pytest.raises(InputError, match=missing):
        attention_backend(name)


@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_kernels_of_16_bits_are_refused_for_an_fp32_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.attention.available_backends", lambda: list(BACKENDS))
    with pytest.raises(InputError, match=f"{name}' has no kernels for an fp32 model: use sdpa"):
        attention_backend(name, torch.float32)
    assert attention_backend(name, torch.bfloat16) is BACKENDS[name]

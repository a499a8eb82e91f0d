"""The same figures on a GPU. Skipped without one."""

from pathlib import Path

import pytest
import torch

from engine.kv.selection import importance
from launch.conformance.command import check_file
from models.attention import attention_backend, available_backends
from models.magi.layers import Fp8Linear, product_in_fp32

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(
    "case",
    [
        *("t2v_distill16", "t2v_base_cfg3", "v2v_prefix9", "flowcache_nodup", "kv_selection", "vae"),
        *("sampling_12step_window1", "released_plain", "released_gated", "released_24b_forward", "released_fp8_linear"),
        *("released_reuse_bf16", "skyreels/df_sync_bf16"),
    ],
)
def test_golden_passes_on_a_gpu(case):
    verdict = check_file(GOLDENS / f"{case}.safetensors", device="cuda")
    assert verdict.passed, verdict.detail


def test_a_bf16_product_with_an_fp32_result_is_that_of_fp32_operands():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 300, 512, device="cuda").bfloat16(), torch.randn(128, 512, device="cuda").bfloat16()
    exact = (x.double() @ weight.double().T).float()
    got = product_in_fp32(x, weight)
    assert got.dtype == torch.float32 and got.shape == exact.shape
    assert (got - exact).norm() <= 1e-5 * exact.norm()  # 1e-3 where sums or results are rounded to bf16


@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_backends_agree(name):
    if name not in available_backends():
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    q = torch.randn(2, 33, 8, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 77, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    expected = attention_backend("sdpa")(q, k, v).float()
    assert torch.allclose(attention_backend(name)(q, k, v).float(), expected, atol=2e-2)


def test_grouped_heads_are_attended_to_as_folded_ones():
    torch.manual_seed(0)
    q = torch.randn(1, 300, 24, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 900, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    expected = attention_backend("sdpa")(q.float(), k.float(), v.float())  # fp32 is folded
    assert torch.allclose(attention_backend("auto", q.dtype)(q, k, v).float(), expected, atol=2e-2)


def test_scores_of_bf16_values_are_those_of_their_fp32_copies():
    torch.manual_seed(0)
    queries, keys = (torch.randn(n, h, 64, device="cuda", dtype=torch.bfloat16) for n, h in ((50, 8), (700, 4)))
    assert torch.allclose(importance(queries, keys), importance(queries.float(), keys.float()), rtol=1e-4)


def test_fp8_products_are_those_of_bf16_copies():
    torch.manual_seed(0)
    layer = Fp8Linear(256, 128, smooth=True)
    layer.weight.data = (30 * torch.randn(1, 128, 256)).to(torch.float8_e4m3fn)
    x = torch.randn(2, 70, 256).bfloat16()
    expected = layer(x).float()
    got = layer.cuda()(x.cuda()).cpu().float()
    assert (got - expected).norm() <= 1e-3 * expected.norm()

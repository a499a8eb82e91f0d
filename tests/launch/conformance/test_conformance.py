"""Published figures: all golden files pass, and a file with one number changed fails."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.reuse.policy import change_norms
from launch.conformance.command import check_file, remake
from launch.conformance.golden import IN_FP8, ON_GPU, TOLERANCES, compare, identical, read_golden, relative_error
from models.errors import InputError
from models.magi.layers import Fp8Linear

GOLDENS = Path(__file__).parents[2] / "data" / "goldens"
FILES = [*GOLDENS.glob("*.safetensors"), *GOLDENS.glob("skyreels/*.safetensors")]
CASES = sorted(path for path in FILES if not path.stem.startswith("weights"))
LARGE = {"released_24b_forward", "released_4.5b_forward", "released_gated", "released_plain"}

FORWARD = (
    '{"first_chunk": 2, "context_chunks": 2, "text": ["caption", "caption", "caption"], "key_chunks": [[1, 3], [0, 4], '
    '[1, 5]], "drop": false, "distill": 8.0, "token_stride": 4}'
)


def rewritten(source, target, change, metadata=None):
    """A copy of a golden file with some tensors or metadata changed."""
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        kept = file.metadata()
    change(tensors)
    save_file(tensors, target, metadata={**kept, **(metadata or {})})
    return target


@pytest.fixture
def beside(tmp_path):
    for weights in GOLDENS.rglob("weights*.safetensors"):
        (tmp_path / weights.name).symlink_to(weights)
    return tmp_path


def test_every_kind_of_file_is_there():
    assert {read_golden(path, "cpu").kind for path in CASES} == set(TOLERANCES)


def slow_if_large(path):
    """The forwards at released head sizes take seconds each."""
    marks = [pytest.mark.slow] if path.stem in LARGE else []
    return pytest.param(path, marks=marks, id=path.stem)


@pytest.mark.parametrize("path", [slow_if_large(path) for path in CASES])
def test_golden_passes_and_one_changed_number_fails(path):
    """Every tensor of figures is made again and agrees; with one number changed in any of them the file fails."""
    golden = read_golden(path, "cpu")
    made = remake(golden)
    verdict = compare(golden, made)
    assert verdict.passed, verdict
    figures = {name for name in golden.tensors if re.match(r"(\w+\.)?output\.|fp32\.|mid\.", name)}
    assert figures == {name for name, _ in made}
    for device in ("cpu", "cuda") if golden.kind in ON_GPU else ("cpu",):  # which says what is allowed
        for name in figures:
            tensors = golden.tensors | {name: with_one_number_changed(golden.tensors[name])}
            verdict = compare(replace(golden, tensors=tensors, device=device), made)
            assert not verdict.passed and name in verdict.detail, verdict


def with_one_number_changed(tensor):
    """The middle one of those that are numbers, by as much as the numbers of the tensor differ from zero."""
    changed = tensor.clone()
    if changed.dtype == torch.float8_e4m3fn or not changed.is_floating_point():
        changed.view(torch.uint8 if changed.dtype == torch.float8_e4m3fn else changed.dtype).view(-1)[0] ^= 1
        return changed
    (numbers,) = torch.nonzero(changed.flatten().isfinite(), as_tuple=True)
    changed.view(-1)[numbers[len(numbers) // 2]] += tensor.double().square().nanmean().sqrt().to(tensor.dtype)
    return changed


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("t2v_fullkv_window2", "input.noise"),
        ("released_fp8_linear", "input.x"),
        ("released_fp8_linear", "channel.weight_scale"),
        ("released_fp8_linear", "tensor_uneven.input_scale"),
        ("released_reuse_bf16", "latents.009"),
        ("kv_selection", "input.key"),
        ("vae", "input.video.image"),
        ("skyreels/forward_fps", "input.x"),
        ("skyreels/forward_fps_bf16", "input.context"),
        ("skyreels/forward_nofps", "input.t.df"),
        ("skyreels/forward_i2v", "input.y"),
        ("skyreels/forward_i2v", "input.clip"),
        ("skyreels/df_start_end", "input.end_latents"),
        ("skyreels/df_teacache_noret_odd", "input.noise.iter0"),
        ("skyreels/df_sync_bf16", "input.negative_context"),
        ("skyreels/flowcache_compress1", "input.addnoise.iter1"),
        ("skyreels/causal_wan_prefix3", "input.renoise"),
        ("skyreels/scheduler_unipc", "input.model_outputs.n12.shift8.0"),
    ],
)
def test_one_changed_number_of_the_input_fails(beside, case, tensor):
    def change(tensors):
        tensors[tensor].view(-1)[0] += 50

    verdict = check_file(rewritten(GOLDENS / f"{case}.safetensors", beside / "case.safetensors", change))
    assert not verdict.passed


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("released_plain", "weights_seed", "20260103"),
        ("released_4.5b_forward", "caption_sha256", "0"),
        ("released_plain", "forward", '{"first_chunk": 1}'),
        ("released_gated", "forward", FORWARD.replace("[1, 3]", "[2, 6]")),
        ("released_gated", "forward", FORWARD.replace('"context_chunks": 2', '"context_chunks": 1')),
        ("released_4.5b_forward", "weights", "{}"),
        ("skyreels/forward_fps", "cases", '{"one": {"t": "input.t.one", "fps_index": [2]}}'),
        ("skyreels/forward_fps", "cases", '{"one": {"t": "input.time"}}'),
        ("skyreels/forward_fps", "config", '{"model_type": "t2v"}'),
    ],
)
def test_figures_that_do_not_fit_a_forward_are_named(beside, case, key, value):
    path = rewritten(GOLDENS / f"{case}.safetensors", beside / "x.safetensors", lambda _: None, {key: value})
    with pytest.raises(InputError, match="x.safetensors"):
        check_file(path)


sums_as_published = pytest.mark.skipif(
    "GenuineIntel" not in Path("/proc/cpuinfo").read_text(),
    reason="only Intel's CPUs are known to add up products in the order of the one that these files were made on",
)


@sums_as_published
def test_a_video_in_bf16_with_the_published_softmax_is_the_published_one_bit_for_bit():
    golden = read_golden(GOLDENS / "skyreels" / "df_sync_bf16.safetensors", "cpu")
    ((name, made),) = remake(golden)
    assert made.dtype == torch.bfloat16 and identical(made, golden.tensors[name])


@pytest.mark.parametrize(("name", "word", "passes"), [
    ("x", ', "causal_attention": true', True),
    ("df_causal", "", True),  # as it is published
    ("x", "", False),  # another video
])  # fmt: skip
def test_that_attention_is_causal_by_blocks_is_said_or_known_by_the_name(beside, name, word, passes):
    path = GOLDENS / "skyreels" / "df_causal.safetensors"
    told = read_golden(path, "cpu").metadata["sampling"].replace(', "causal_attention": true', word)
    assert ("causal_attention" in told) == bool(word)
    assert (
        check_file(rewritten(path, beside / f"{name}.safetensors", lambda _: None, {"sampling": told})).passed == passes
    )


@sums_as_published
def test_a_forward_in_bf16_with_the_published_softmax_is_the_published_one_bit_for_bit():
    golden = read_golden(GOLDENS / "skyreels" / "forward_fps_bf16.safetensors", "cpu")
    made = remake(golden)
    published = dict(made[len(made) // 2 :])
    assert published.keys() == {name for name in golden.tensors if not name.startswith("input.")}
    for name, tensor in published.items():
        assert identical(tensor, golden.tensors[name]), name


@pytest.mark.parametrize("case", ["released_fp8_linear", "released_reuse_bf16"])
def test_sums_a_little_off_round_bf16_as_a_gpu_may_and_a_cpu_may_not(case, monkeypatch):
    def linear(x, weight, bias=None, product=torch.nn.functional.linear):
        y = product(x.float(), weight.float(), None if bias is None else bias.float())
        return (y * (1 + 1e-5 * torch.randn_like(y))).to(x.dtype)

    golden = read_golden(GOLDENS / f"{case}.safetensors", "cpu")
    torch.manual_seed(0)
    monkeypatch.setattr("torch.nn.functional.linear", linear)
    made = remake(golden)
    assert compare(replace(golden, device="cuda"), made).passed
    assert not compare(golden, made).passed


def test_distances_that_are_not_rounded_fail_where_a_gpu_may_round_otherwise(monkeypatch):
    def unrounded(then, now, dtype):
        return change_norms(then, now, torch.float32)

    golden = read_golden(GOLDENS / "released_reuse_bf16.safetensors", "cpu")
    monkeypatch.setattr("launch.conformance.generation.change_norms", unrounded)
    verdict = compare(replace(golden, device="cuda"), remake(golden))
    assert "output.distance is off by" in verdict.detail and "flags" not in verdict.detail, verdict


def test_products_in_fp8_are_compared_beside_those_in_bf16(monkeypatch):
    golden = read_golden(GOLDENS / "released_fp8_linear.safetensors", "cpu")
    monkeypatch.setattr(Fp8Linear, "multiplies_fp8", True)  # a CPU does too, slowly
    made, on_gpu = remake(golden), replace(golden, device="cuda")
    verdict = compare(on_gpu, made)
    assert verdict.passed and verdict.detail == "9 comparisons, 3 identical, 3 in fp8", verdict
    off = {name: tensor * 1.004 for name, tensor in made if name.startswith(IN_FP8)}
    said = compare(on_gpu, (dict(made) | off).items()).detail
    assert len(off) == said.count(" is off by") == 3 and all(f"{name} is off by" in said for name in off)


def test_a_changed_weight_fails(beside):
    (beside / "weights.safetensors").unlink()

    def change(tensors):
        tensors["videodit_blocks.layers.1.self_attention.linear_proj.weight"].view(-1)[0] += 4

    rewritten(GOLDENS / "weights.safetensors", beside / "weights.safetensors", change)
    (beside / "case.safetensors").symlink_to(GOLDENS / "t2v_fullkv_window2.safetensors")
    assert not check_file(beside / "case.safetensors").passed


def test_files_that_cannot_be_read_are_named(beside):
    broken = beside / "broken.safetensors"
    broken.write_bytes((GOLDENS / "kv_selection.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="broken.safetensors"):
        check_file(broken)
    with pytest.raises(InputError, match="absent.safetensors"):
        check_file(beside / "absent.safetensors")
    with pytest.raises(InputError, match="kind"):
        check_file(GOLDENS / "weights.safetensors")


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
SELECTION = '{"mix_lambda": 0.07, "pool_kernel": 7, "grid_thw": [6, 3, 4], "query_tokens_for_token_granularity": 50'


@pytest.mark.parametrize(
    ("case", "gone", "metadata"),
    [
        ("kv_selection", "output.", {}),
        ("kv_selection", "output.keep.frame.query_chunk", {}),
        ("kv_selection", "input.key", {}),
        ("kv_selection", None, {"config": "{}"}),
        ("kv_selection", None, {"config": DEEP}),
        ("kv_selection", None, {"config": SELECTION + "}"}),
        ("kv_selection", None, {"config": SELECTION + ', "keep": "x", "gqa_pool": "max"}'}),
        ("kv_selection", None, {"config": SELECTION + ', "keep": 100000, "gqa_pool": "max"}'}),
        ("vae", "output.decoded.image", {}),
        ("vae", "input.", {}),
        ("vae", "weights.", {}),
        ("t2v_fullkv_window2", "output.", {}),
        ("t2v_fullkv_window2", "output.chunk.003", {}),
        ("t2v_fullkv_window2", "input.caption_mask", {}),
        ("v2v_prefix9", "output.chunk.004", {}),
        ("flowcache_nodup", "output.reuse_flags", {}),
        ("flowcache_nodup", None, {"cache": '{"policy": "flowcache", "threshold": "x"}'}),
        ("flowcache_nodup", None, {"cache": DEEP}),
        ("flowcache_nodup", None, {"weights": "/etc/passwd"}),
    ],
)
def test_a_file_that_lacks_what_its_kind_promises_cannot_be_read(beside, case, gone, metadata):
    def change(tensors):
        for name in [name for name in tensors if gone is not None and name.startswith(gone)]:
            del tensors[name]

    path = rewritten(GOLDENS / f"{case}.safetensors", beside / f"{case}.safetensors", change, metadata)
    with pytest.raises(InputError, match=case if "weights" not in metadata else "passwd"):
        check_file(path)


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("kv_selection", "input.key"),
        ("kv_selection", "input.query"),
        ("kv_selection", "output.keep.token.query_token"),
        ("vae", "input.video.image"),
        ("t2v_fullkv_window2", "input.noise"),
        ("t2v_fullkv_window2", "input.caption_embs"),
        ("i2v_prefix1", "input.prefix_latents"),
        ("released_fp8_linear", "input.x"),
        ("released_fp8_linear", "channel.weight"),
        ("released_plain", "input.latents"),
        ("released_gated", "input.context_latents"),
        ("released_4.5b_forward", "input.keys"),
        ("released_reuse_bf16", "latents.009"),
        ("skyreels/forward_fps", "input.x"),
        ("skyreels/forward_i2v", "input.clip"),
    ],
)
@pytest.mark.parametrize("shape", [(0,), (3,), (1, 2, 3), (1, 16, 6, 2, 2)], ids=str)
def test_a_tensor_of_another_shape_is_named(beside, case, tensor, shape):
    path = rewritten(
        GOLDENS / f"{case}.safetensors",
        beside / "x.safetensors",
        lambda held: held.update({tensor: torch.zeros(shape)}),
    )
    with pytest.raises(InputError, match=f"x.safetensors: .*({tensor}|input.noise|do not fit)"):
        check_file(path)


def test_an_unknown_cache_setting_is_named(beside):
    path = rewritten(
        GOLDENS / "flowcache_nodup.safetensors", beside / "x.safetensors", lambda _: None, {"cache": '{"magic": 1}'}
    )
    with pytest.raises(InputError, match="magic"):
        check_file(path)


def test_relative_error_of_a_nan_or_another_shape_is_infinite():
    one = torch.ones(3)
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), one) == float("inf")
    assert relative_error(torch.ones(2), one) == float("inf")
    assert relative_error(one, one) == 0

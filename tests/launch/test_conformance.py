"""Published figures: all golden files pass, and a file with one number changed fails."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from launch.conformance import check_file, relative_error
from models.errors import InputError

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"
CASES = sorted(path for path in GOLDENS.glob("*.safetensors") if not path.stem.startswith("weights"))


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
    for weights in GOLDENS.glob("weights*.safetensors"):
        (tmp_path / weights.name).symlink_to(weights)
    return tmp_path


def test_there_are_twelve_cases():
    assert len(CASES) == 12


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden_passes(path):
    verdict = check_file(path)
    assert verdict.passed, verdict
    assert verdict.error <= 1e-4
    if path.stem.startswith("flowcache"):
        assert "flags equal" in verdict.detail
    if path.stem == "kv_selection":
        assert "9 combinations" in verdict.detail


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("t2v_fullkv_window2", "output.chunk.003"),
        ("flowcache_nodup", "output.reuse_flags"),
        ("kv_selection", "output.keep.frame.query_token"),
        ("vae", "output.latent_mode.image"),
        ("vae", "output.decoded.native"),
    ],
)
def test_one_changed_number_fails(beside, case, tensor):
    def change(tensors):
        flat = tensors[tensor].view(-1)
        if tensor.startswith("output.decoded"):  # stored as fp16, so the change must be large
            flat[0] = 100
        elif flat.is_floating_point():
            flat[0] += 1
        else:
            flat[0] = 1 - flat[0]

    verdict = check_file(rewritten(GOLDENS / f"{case}.safetensors", beside / f"{case}.safetensors", change))
    assert not verdict.passed


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

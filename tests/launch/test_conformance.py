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

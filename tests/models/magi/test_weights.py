"""Checkpoints: real safetensors files, whole and damaged, and the sizes of the released models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import Loading
from models.config import checked
from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.vae import ViTVAE
from models.magi.weights import Checkpoint
from tests.models.released import GOLDENS, random_weights, released_config, tiny_config

LAYER = "videodit_blocks.layers."


def write_shards(folder: Path, weights: dict[str, Tensor]) -> None:
    """One shard per layer and one for the rest, with an index, as the released checkpoints are laid out."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        part = name.removeprefix(LAYER).split(".")[0] if name.startswith(LAYER) else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def config() -> MagiConfig:
    return tiny_config()


@pytest.fixture
def weights(config: MagiConfig) -> dict[str, Tensor]:
    return random_weights(config)


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    write_shards(tmp_path, weights)
    return tmp_path


def message(config: MagiConfig, folder: Path, layers: range | None = None) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint(folder).dit(config, Loading(layers=layers))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_and_a_single_file_give_the_same_model(
    config: MagiConfig, weights: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    sharded = Checkpoint(folder).dit(config).state_dict()
    single = Checkpoint(tmp_path / "one").dit(config).state_dict()
    assert sharded.keys() == single.keys() == weights.keys()
    for name, stored in weights.items():
        assert torch.equal(sharded[name], stored.to(sharded[name].dtype)), name
        assert torch.equal(single[name], sharded[name]), name


def test_a_path_to_a_file_is_read_as_it_is() -> None:
    config = golden_config()
    model = Checkpoint(GOLDENS / "weights.safetensors").dit(config)
    stored = load_file(GOLDENS / "weights.safetensors")
    name = LAYER + "0.mlp.linear_fc1.weight"
    assert stored[name].dtype == torch.float16
    assert torch.equal(model.state_dict()[name], stored[name].float())


def golden_config() -> MagiConfig:
    with safe_open(GOLDENS / "t2v_distill16.safetensors", framework="pt") as file:
        return MagiConfig.from_dict(json.loads(file.metadata()["config"]), source="golden")


def test_the_model_is_ready_to_infer(config: MagiConfig, folder: Path) -> None:
    model = Checkpoint(folder).dit(config)
    assert not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


def test_promotion_follows_the_released_list(config: MagiConfig, folder: Path) -> None:
    dtypes = {name: tensor.dtype for name, tensor in Checkpoint(folder).dit(config).state_dict().items()}
    single = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - single} == {torch.bfloat16}
    norms = ("self_attn_post_norm", "mlp_post_norm", "self_attention.q_layernorm", "self_attention.k_layernorm")
    expected = {
        f"{LAYER}{i}.{norm}.{kind}"
        for i in range(config.model_config.num_layers)
        for norm in norms
        for kind in ("weight", "bias")
    }
    expected |= {"x_embedder.weight", "rope.bands", "final_linear.linear.weight", "y_embedder.null_caption_embedding"}
    for part in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.y_proj_xattn.0", "y_embedder.y_proj_adaln.0"):
        expected |= {f"{part}.weight", f"{part}.bias"}
    expected |= {"videodit_blocks.final_layernorm.weight", "videodit_blocks.final_layernorm.bias"}
    assert single == expected


def test_norms_may_be_stored_in_either_dtype(config: MagiConfig, weights: dict[str, Tensor], tmp_path: Path) -> None:
    norm = LAYER + "0.self_attention.linear_qkv.layer_norm.weight"
    promoted = LAYER + "0.mlp_post_norm.weight"
    save_file(
        weights | {norm: weights[norm].float(), promoted: weights[promoted].bfloat16()},
        tmp_path / "model.safetensors",
    )
    state = Checkpoint(tmp_path).dit(config).state_dict()
    assert state[norm].dtype == torch.bfloat16
    assert state[promoted].dtype == torch.float32
    assert torch.equal(state[norm], weights[norm])


def test_a_stage_reads_only_the_shards_of_its_layers(
    config: MagiConfig, weights: dict[str, Tensor], folder: Path
) -> None:
    (folder / "model-1.safetensors").unlink()
    (folder / "model-2.safetensors").write_bytes(b"damaged")
    stage = Checkpoint(folder).dit(config, Loading(layers=range(1))).state_dict()
    assert {name for name in stage if name.startswith(LAYER)} == {n for n in weights if n.startswith(LAYER + "0.")}
    assert "x_embedder.weight" in stage
    assert "final_linear.linear.weight" not in stage
    assert "model-1.safetensors" in message(config, folder, range(1, 2))
    assert "model-2.safetensors is not a complete safetensors file" in message(config, folder, range(2, 3))


def test_stages_together_hold_every_tensor_and_keep_absolute_names(
    config: MagiConfig, weights: dict[str, Tensor], folder: Path
) -> None:
    stages = [Checkpoint(folder).dit(config, Loading(layers=part)).state_dict() for part in (range(2), range(2, 3))]
    assert stages[0].keys() | stages[1].keys() == weights.keys()
    name = LAYER + "2.mlp.linear_fc2.weight"
    assert torch.equal(stages[1][name], weights[name])


def test_a_truncated_file_is_named_with_its_first_bad_tensor(config: MagiConfig, folder: Path) -> None:
    path = folder / "model-1.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    ordered = sorted(spans, key=lambda name: spans[name])
    bad = ordered[len(ordered) // 2]
    path.write_bytes(content[: 8 + length + spans[bad][1] - 1])  # one byte of it is lacking
    text = message(config, folder)
    assert f"{path} is truncated" in text
    assert f"from {bad} on" in text


@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_file_that_ends_in_its_header_is_reported(config: MagiConfig, folder: Path, size: int) -> None:
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is not a complete safetensors file ({size} bytes)" in message(config, folder)


def test_a_git_lfs_pointer_is_reported(config: MagiConfig, folder: Path) -> None:
    (folder / "model-0.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is not a complete safetensors file" in message(config, folder)


def test_bytes_after_the_last_tensor_are_reported(config: MagiConfig, folder: Path) -> None:
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert f"cannot read {path}" in message(config, folder)


def test_a_missing_tensor_is_named(config: MagiConfig, weights: dict[str, Tensor], tmp_path: Path) -> None:
    del weights[LAYER + "1.mlp.linear_fc1.weight"]
    write_shards(tmp_path, weights)
    assert f"lacks {LAYER}1.mlp.linear_fc1.weight:" in message(config, tmp_path)


def test_a_shard_without_what_the_index_says_is_named(
    config: MagiConfig, weights: dict[str, Tensor], folder: Path
) -> None:
    name = LAYER + "1.mlp.linear_fc1.weight"
    kept = {key: value for key, value in weights.items() if key.startswith(LAYER + "1.") and key != name}
    save_file(kept, folder / "model-1.safetensors")
    assert f"model-1.safetensors lacks {name}" in message(config, folder)


def test_a_left_over_tensor_is_named_for_a_whole_model_only(
    config: MagiConfig, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    write_shards(tmp_path, weights | {LAYER + "3.mlp.linear_fc1.weight": torch.zeros(2)})
    assert f"{LAYER}3.mlp.linear_fc1.weight that the model does not" in message(config, tmp_path)
    assert Checkpoint(tmp_path).dit(config, Loading(layers=range(1))).held == range(1)


def test_a_wrong_shape_is_named(config: MagiConfig, weights: dict[str, Tensor], tmp_path: Path) -> None:
    name = LAYER + "1.self_attention.linear_qkv.k.weight"
    write_shards(tmp_path, weights | {name: torch.zeros(3, 5)})
    text = message(config, tmp_path)
    assert name in text
    assert "[3, 5], but the model needs [16, 32]" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_found(
    config: MagiConfig, weights: dict[str, Tensor], tmp_path: Path, value: float
) -> None:
    name = LAYER + "1.mlp.linear_fc1.weight"
    weights[name] = weights[name].clone()
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / "model.safetensors")
    assert f"model.safetensors: {name} holds values that are not numbers" in message(config, tmp_path)


def test_integers_are_no_weights(config: MagiConfig, weights: dict[str, Tensor], tmp_path: Path) -> None:
    name = LAYER + "1.mlp.linear_fc1.weight"
    save_file(weights | {name: weights[name].to(torch.int32)}, tmp_path / "model.safetensors")
    assert f"{name} is I32: weights are floating-point numbers" in message(config, tmp_path)


def test_a_compressed_shard_is_named(config: MagiConfig, folder: Path) -> None:
    path = folder / "model-1.safetensors"
    path.rename(folder / "model-1.safetensors.zst")
    assert f"unpack it with zstd -d {path}.zst" in message(config, folder)


def test_an_empty_or_missing_folder_is_reported(config: MagiConfig, tmp_path: Path) -> None:
    assert f"no weights in {tmp_path}" in message(config, tmp_path)
    assert f"no weights in {tmp_path / 'no'}" in message(config, tmp_path / "no")


@pytest.mark.parametrize(
    "header",
    ['{"a":' * 100_000 + "1" + "}" * 100_000, '{"a": {"dtype": "F32", "shape": "abc", "data_offsets": [0, 0]}}', "[]"],
    ids=["deep", "shape", "list"],
)
def test_a_header_that_is_none_is_reported(config: MagiConfig, tmp_path: Path, header: str) -> None:
    content = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    assert "model.safetensors is not a complete safetensors file" in message(config, tmp_path)


def test_a_broken_index_is_reported(config: MagiConfig, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    assert "is not JSON" in message(config, folder)
    index.write_text('{"metadata": {}}')
    assert "weight_map is missing" in message(config, folder)


@pytest.mark.parametrize("large", [False, True])
def test_a_quantised_checkpoint_keeps_fp8_weights_and_fp32_scales(tmp_path: Path, large: bool) -> None:
    config = tiny_config("4.5B_distill_quant", gated_linear_unit=large)
    weights = random_weights(config)
    write_shards(tmp_path, weights)
    state = Checkpoint(tmp_path).dit(config).state_dict()
    attention = LAYER + "1.self_attention."
    assert state[attention + "linear_qkv.q.weight"].dtype == torch.float8_e4m3fn
    assert state[attention + "linear_qkv.q.weight"].shape == (1, 32, 32)
    assert state[attention + "linear_qkv.q.input_scale"].shape == (32,)
    assert state[attention + "linear_proj.smooth_scale"].shape == (1, 64)
    assert {t.dtype for name, t in state.items() if name.endswith("_scale")} == {torch.float32}
    assert state[attention + "linear_kv_xattn.weight"].dtype == torch.bfloat16
    for i in (0, 2):  # the first and the last layer are never quantised
        assert state[f"{LAYER}{i}.self_attention.linear_qkv.q.weight"].dtype == torch.bfloat16
    for name, stored in weights.items():
        assert torch.equal(state[name].float(), stored.float()), name


def test_a_quantised_weight_where_none_is_expected_is_named(
    config: MagiConfig, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    name = LAYER + "1.mlp.linear_fc1.weight"
    write_shards(tmp_path, weights | {name: weights[name].to(torch.float8_e4m3fn)})
    assert f"{name} is F8_E4M3, but the configuration asks for an unquantised dtype" in message(config, tmp_path)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("4.5B_base", 898, 4_459_898_128), ("24B_base", 1262, 23_899_281_936)],
)
def test_released_models_have_the_released_size(name: str, tensors: int, parameters: int) -> None:
    state = meta_state(name)
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters


@pytest.mark.parametrize(("name", "tensors"), [("4.5B_distill_quant", 1410), ("24B_distill_quant", 1998)])
def test_quantised_models_have_the_released_number_of_tensors(name: str, tensors: int) -> None:
    assert len(meta_state(name)) == tensors


def meta_state(name: str) -> dict[str, Tensor]:
    config = released_config(name)
    with torch.device("meta"):
        return MagiDiT(config.model_config, fp8=config.engine_config.fp8_quant).state_dict()


DDCONFIG = {"video_size": 64, "z_chans": 16, "embed_dim": 256, "depth": 1, "num_heads": 4}
DDCONFIG |= {"qkv_bias": True, "ln_in_attn": True, "conv_last_layer": True}


def write_vae(folder: Path, **changes: object) -> dict[str, Tensor]:
    vae = ViTVAE(checked(VaeConfig, DDCONFIG, source="test"))
    with torch.no_grad():
        vae.encoder.pos_embed.normal_()
    config = {"_class_name": "ViTVAE", "_diffusers_version": "0.29.2", "model_type": "vit", "ddconfig": DDCONFIG}
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return vae.state_dict()


def test_the_autoencoder_is_cast_as_a_whole(tmp_path: Path) -> None:
    stored = write_vae(tmp_path)
    vae = Checkpoint(tmp_path).vae(dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    assert vae.state_dict().keys() == stored.keys()
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, stored[name].bfloat16()), name


def test_the_released_autoencoder_has_the_released_size() -> None:
    released = {"z_chans": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4}
    with torch.device("meta"):
        vae = ViTVAE(checked(VaeConfig, DDCONFIG | released | {"video_size": 256}, source="released"))
    assert len(vae.state_dict()) == 248 + 248
    assert sum(parameter.numel() for parameter in vae.parameters()) == 613_755_239


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'"),
        ({"model_type": "vit_ncthw"}, "model_type is 'vit_ncthw'"),
        ({"ddconfig": None}, "ddconfig is missing"),
        ({"ddconfig": DDCONFIG | {"depht": 3}}, "depht"),
        ({"ddconfig": DDCONFIG | {"depth": 2}}, "lacks decoder.blocks.1"),
        ({"ddconfig": DDCONFIG | {"patch_size": 4}}, "patch_size must be 8 and patch_length 4"),
        ({"ddconfig": DDCONFIG | {"num_heads": 0}}, "num_heads: Input should be greater than or equal to 1"),
    ],
)
def test_another_autoencoder_is_reported(tmp_path: Path, changes: dict[str, object], part: str) -> None:
    write_vae(tmp_path, **changes)
    with pytest.raises(InputError, match=part):
        Checkpoint(tmp_path).vae(dtype=torch.float32)


def test_a_missing_autoencoder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the autoencoder's configuration"):
        Checkpoint(tmp_path).vae(dtype=torch.float32)

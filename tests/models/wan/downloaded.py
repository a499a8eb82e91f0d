"""Small models of this family laid out as they are downloaded: as SkyReels-V2 is released, as diffusers has it, and
Self-Forcing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.wan import image, text, vae
from models.wan.config import WanShapes
from models.wan.weights import diffusers_name
from tests.models.downloaded import write_shards, write_tokenizer
from tests.models.wan.small import IMAGE_SHAPES, SHAPES, small_config, small_dit

SMALL_VAE = vae.WanVaeConfig(base_dim=4, dim_mult=(1, 2, 2, 2))
FORCING_SHAPES = replace(SHAPES, inject_sample_info=False, dim=128, num_heads=1, num_layers=2)
"""Self-Forcing has no config.json, and heads of 128 channels."""


def released(folder: Path, shapes: WanShapes = SHAPES) -> Path:
    """As SkyReels-V2 is released."""
    state = small_dit(small_config(shapes)).state_dict()
    write_shards(folder, state)
    kept = (
        "model_type",
        "dim",
        "ffn_dim",
        "num_heads",
        "num_layers",
        "in_dim",
        "out_dim",
        "freq_dim",
        "eps",
        "text_len",
    )
    values = {name: getattr(shapes, name) for name in (*kept, "inject_sample_info", "text_dim", "clip_dim")}
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "WanModel", "_diffusers_version": "0.31.0"} | values)
    )
    _write_parts(folder)
    if shapes.sees_image:
        torch.save(released_clip(), folder / image.RELEASED_CLIP)
    return folder


def self_forcing(folder: Path) -> Path:
    """A file of Self-Forcing with the parts of Wan 2.1 where its instructions put them."""
    (folder / "checkpoints").mkdir(parents=True)
    state = small_dit(small_config(FORCING_SHAPES)).state_dict()
    held = {"generator_ema": {f"model.{name}": tensor for name, tensor in state.items()}}
    torch.save(held, folder / "checkpoints" / "self_forcing_dmd.pt")
    _write_parts(folder / "wan_models" / "Wan2.1-T2V-1.3B")
    return folder


def of_diffusers(folder: Path, shapes: WanShapes = SHAPES) -> Path:
    """As diffusers has it."""
    state = small_dit(small_config(shapes)).state_dict()
    theirs = {diffusers_name(name): tensor for name, tensor in state.items()}
    write_shards(folder / "transformer", theirs, "diffusion_pytorch_model")
    values = {
        "_class_name": "SkyReelsV2Transformer3DModel",
        "num_attention_heads": shapes.num_heads,
        "attention_head_dim": shapes.head_size,
        "in_channels": shapes.in_dim,
        "out_channels": shapes.out_dim,
        "image_dim": shapes.clip_dim if shapes.sees_image else None,
        "added_kv_proj_dim": shapes.dim if shapes.sees_image else None,
        "qk_norm": "rms_norm_across_heads",
        "patch_size": [1, 2, 2],
    } | {key: getattr(shapes, key) for key in ("ffn_dim", "freq_dim", "num_layers", "text_dim", "inject_sample_info")}
    (folder / "transformer" / "config.json").write_text(json.dumps(values))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SkyReelsV2DiffusionForcingPipeline"}))
    (folder / "vae").mkdir()
    save_file(small_vae().state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    described = {"_class_name": "AutoencoderKLWan"} | asdict(SMALL_VAE)
    (folder / "vae" / "config.json").write_text(json.dumps(described))
    write_tokenizer(folder / "tokenizer")
    small_umt5().save_pretrained(folder / "text_encoder")
    if shapes.sees_image:
        write_clip(folder / "image_encoder")
    return folder


LAYOUTS = {
    "released": released,
    "diffusers": of_diffusers,
    "self-forcing": self_forcing,
    "image": lambda folder: released(folder, IMAGE_SHAPES),
    "image of diffusers": lambda folder: of_diffusers(folder, IMAGE_SHAPES),
}


def _write_parts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = {vae.released_name(name): tensor for name, tensor in small_vae().state_dict().items()}
    torch.save(autoencoder, folder / vae.RELEASED_VAE)
    encoder = {text.released_name(name): tensor for name, tensor in small_umt5().state_dict().items()}
    torch.save(encoder, folder / text.RELEASED_TEXT)
    write_tokenizer(folder / text.RELEASED_TOKENIZER)


def small_vae() -> torch.nn.Module:
    """An autoencoder whose frames are no grey."""
    network = vae.empty_vae(SMALL_VAE).to_empty(device="cpu").float().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        fan = parameter[0].numel() if parameter.dim() > 3 and "gamma" not in name else 4
        torch.nn.init.normal_(parameter, std=fan**-0.5, generator=generator)
    return network


def small_umt5(channels: int = SHAPES.text_dim):
    """An encoder as `models_t5_umt5-xxl-enc-bf16.pth` holds, but small."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": channels, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).eval()


def small_clip():
    """A vision tower of CLIP with 257 tokens."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": IMAGE_SHAPES.clip_dim, "intermediate_size": 48, "num_hidden_layers": 3}
    config = CLIPVisionConfig(**sizes, num_attention_heads=1, image_size=32, patch_size=2, hidden_act="gelu")
    return CLIPVisionModel(config).eval()


def write_clip(folder: Path) -> None:
    """As diffusers has it."""
    small_clip().save_pretrained(folder)


def released_clip() -> dict[str, torch.Tensor]:
    """As Wan's file has it: queries, keys and values in one tensor, and a tower for texts beside it."""
    apart = {image.released_name(name): tensor for name, tensor in small_clip().state_dict().items()}
    held = {
        "log_scale": torch.zeros(()),
        "visual.head": torch.zeros(4, 4),
        "textual.token_embedding.weight": torch.ones(2),
    }
    for name, tensor in apart.items():
        stem, found, last = name.rpartition(".attn.q.")
        if found:
            fused = [apart[f"{stem}.attn.{one}.{last}"] for one in "qkv"]
            held[f"{stem}.attn.to_qkv.{last}"] = torch.cat(fused)
        elif ".attn.k." not in name and ".attn.v." not in name:
            held[name] = tensor.clone()
    held["visual.cls_embedding"] = held["visual.cls_embedding"].view(1, 1, -1)
    held["visual.pos_embedding"] = held["visual.pos_embedding"][None]
    return held

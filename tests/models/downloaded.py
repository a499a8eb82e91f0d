"""Small models laid out as they are downloaded: a checkout of MAGI-1 with ckpt/magi/NAME, ckpt/vae and ckpt/t5."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.magi.config import MagiConfig, VaeConfig
from models.magi.vae import ViTVAE
from tests.models.released import random_weights, tiny_config

CHANNELS = 24  # of a caption
SIDE = 32  # pixels that such a model is asked for
CORPUS = "a cat sits on a red mat while the dog looks at the blue sky and a bird sings in the green tree near a lake"
_VAE = VaeConfig(
    video_size=32, video_length=8, z_chans=16, embed_dim=256, depth=1, num_heads=2, mlp_ratio=1.0, qkv_bias=True,
    ln_in_attn=True, conv_last_layer=True,
)  # fmt: skip


def download(root: Path, name: str) -> Path:
    """Lay out a small model of a released kind, such as `24B_distill_quant`; gives the folder for `--weights`."""
    folder = root / "ckpt" / "magi" / name
    config = small_config(name)
    kind = "".join((".fp8" if "quant" in name else "", ".distill" if "distill" in name else ""))
    write_shards(folder / f"inference_weight{kind}", random_weights(config))
    if not (root / "ckpt" / "vae").is_dir():
        write_vae(root / "ckpt" / "vae")
        write_t5(root / "ckpt" / "t5")
        write_tokens(root / "example" / "assets" / "special_tokens.npz")
    return folder


def small_config(name: str) -> MagiConfig:
    """The configuration of that model."""
    shapes = {"in_channels": 32, "out_channels": 32, "ffn_hidden_size": 48} if name.startswith("24B") else {}
    return tiny_config(name, caption_channels=CHANNELS, **shapes)


def write_shards(folder: Path, weights: dict[str, Tensor], stem: str = "model") -> Path:
    """Two shards and an index, as the released checkpoints are laid out."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    files = {name: f"{stem}-0000{1 + 2 * place // len(names)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def write_vae(folder: Path) -> None:
    """A small autoencoder."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    vae = ViTVAE(_VAE)
    save_file(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "ViTVAE", "_diffusers_version": "0.29.2", "model_type": "vit", "ddconfig": asdict(_VAE)}
    (folder / "config.json").write_text(json.dumps(config))


def write_t5(root: Path, channels: int = CHANNELS, corpus: str = CORPUS) -> None:
    """A small T5 with a sentencepiece model, and no tokenizer.json."""
    from transformers import T5Config, T5EncoderModel  # seconds, for which no other test should wait

    folder = root / "t5-v1_1-xxl"
    write_tokenizer(folder, corpus)
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": channels, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder)


def write_tokenizer(folder: Path, corpus: str = CORPUS) -> None:
    """A vocabulary of sentencepiece."""
    folder.mkdir(parents=True)
    (folder / "corpus.txt").write_text(corpus)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=40, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')


def write_tokens(path: Path, channels: int = CHANNELS) -> None:
    """Special tokens of the released shape but for the channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).standard_normal((102, channels))
    np.savez(path, caption_token=rows[:1], logo_token=rows[1:2], other_tokens=rows[2:])

"""What can be wrong with downloaded folders of this family, and what is said of it."""

import json

import torch

from models.wan.image import RELEASED_CLIP


def damaged(source, folder, damage):
    """A copy of a folder that is damaged."""
    for path in source.rglob("*"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    damage(folder)
    return folder


def _json(path, **values):
    def damage(folder):
        held = json.loads((folder / path).read_text()) | values
        (folder / path).write_text(json.dumps({key: value for key, value in held.items() if value != "gone"}))

    return damage


def _gone(path):
    return lambda folder: (folder / path).rename(folder / "elsewhere")


def _cut(path, size=200):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:size])


def _two_generators(folder):
    (folder / "checkpoints" / "other.pt").write_bytes(b"x")


class _Runs:
    def __reduce__(self):
        return print, ("run",)


def _code(path):
    """Something in it that would be run."""

    def damage(folder):
        torch.save(torch.load(folder / path, weights_only=True) | {"code": _Runs()}, folder / path)

    return damage


SHARD = "model-00001-of-00002.safetensors"
DAMAGE = {
    "no description": ("released", _gone("config.json"), "holds no model: it needs config.json"),
    "no JSON": ("released", lambda folder: (folder / "config.json").write_text('{"model_type'), "is not JSON"),
    "an unknown key": ("released", _json("config.json", magic=1), "magic: unknown key"),
    "a key that is missing": ("released", _json("config.json", dim="gone"), "dim: key is missing"),
    "a number out of bounds": ("released", _json("config.json", num_layers=100_000), "num_layers: "),
    "no number": ("released", _json("config.json", eps=float("nan")), "eps: "),
    "heads that do not fit": ("released", _json("config.json", num_heads=5), "multiple of num_heads"),
    "another model": ("released", _json("config.json", model_type="llama"), "model_type: "),
    "more layers than weights": ("released", _json("config.json", num_layers=4), "lacks blocks.3."),
    "fewer layers than weights": ("released", _json("config.json", num_layers=2), "has blocks.2."),
    "another width": ("released", _json("config.json", ffn_dim=65), "has shape"),
    "a shard is missing": ("released", _gone(SHARD), f"{SHARD}: No such file"),
    "a shard is cut": ("released", _cut(SHARD, 40_000), f"{SHARD} is truncated"),
    "a shard is something else": ("released", _cut(SHARD, 5), "no complete|not a complete safetensors"),
    "no index": ("released", _gone("model.safetensors.index.json"), "no weights in"),
    "no autoencoder": ("released", _gone("Wan2.1_VAE.pth"), "is not complete: no Wan2.1_VAE.pth in "),
    "no encoder": ("released", _gone("models_t5_umt5-xxl-enc-bf16.pth"), "no models_t5_umt5-xxl-enc-bf16.pth in "),
    "no vocabulary": ("released", _gone("google/umt5-xxl/spiece.model"), "lacks spiece.model"),
    "an autoencoder that is cut": ("released", _cut("Wan2.1_VAE.pth"), "Wan2.1_VAE.pth is no complete file"),
    "an encoder that is cut": ("released", _cut("models_t5_umt5-xxl-enc-bf16.pth"), "enc-bf16.pth is no complete"),
    "another class": ("diffusers", _json("vae/config.json", _class_name="X"), "only 'AutoencoderKLWan'"),
    "another norm": ("diffusers", _json("transformer/config.json", qk_norm="layer"), "qk_norm is 'layer'"),
    "a word of its own": ("diffusers", _json("transformer/config.json", magic=2), "magic: unknown key"),
    "no number of heads": ("diffusers", _json("transformer/config.json", num_attention_heads="gone"), "key is missing"),
    "no folder vae": ("diffusers", _gone("vae"), "no autoencoder .a folder with config.json. in"),
    "no tokenizer": ("diffusers", _gone("tokenizer"), "no folder tokenizer in"),
    "no text encoder": ("diffusers", _gone("text_encoder"), "no UMT5 encoder"),
    "no CLIP": ("image", _gone(RELEASED_CLIP), f"no {RELEASED_CLIP} in"),
    "CLIP that is cut": ("image", _cut(RELEASED_CLIP), "14.pth is no complete file"),
    "CLIP with more than tensors": ("image", _code(RELEASED_CLIP), "holds something else than tensors, and is refused"),
    "an autoencoder with more": ("image", _code("Wan2.1_VAE.pth"), "holds something else than tensors, and is refused"),
    "channels beside the latent": ("image", _json("config.json", in_dim=16), "in_dim must be more than out_dim"),
    "CLIP of another width": ("image", _json("config.json", clip_dim=48), "img_emb.proj.0.* has shape"),
    "no image encoder": ("image of diffusers", _gone("image_encoder/config.json"), "no CLIP image encoder .a folder"),
    "no weights of CLIP": ("image of diffusers", _gone("image_encoder/model.safetensors"), "CLIP image encoder from"),
    "two generators": ("self-forcing", _two_generators, "holds other.pt and self_forcing_dmd.pt"),
    "a generator that is cut": ("self-forcing", _cut("checkpoints/self_forcing_dmd.pt"), "is no complete file"),
}

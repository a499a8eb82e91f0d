"""CLIP's vision tower, for models that see an image, from a released file or a folder of `transformers`.

The released file holds a text tower too, which is left alone, and queries, keys and values of a layer in one tensor.
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import TorchFile, shape_of
from models.errors import InputError
from models.rewriting import Rules
from models.text import check_encoder, load_pretrained, package
from models.wan.config import IMAGE_TOKENS

RELEASED_CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
IMAGE_FOLDER = "image_encoder"
_CLIP, _EXTRA = "the CLIP image encoder", "wan"
_HEAD = 80  # channels of a head, which no tensor's shape says
_SEES = "visual."
_UNUSED = re.compile(r"textual\.|log_scale$|visual\.head$")  # parts of the file that are for comparing with texts
_FUSED = re.compile(r"(visual\.transformer\.\d+\.attn\.)to_qkv\.(weight|bias)")

released_name = Rules(
    (r"^(vision_model\.)?", _SEES),
    (r"\.embeddings\.class_embedding$", ".cls_embedding"),
    (r"\.embeddings\.position_embedding\.weight$", ".pos_embedding"),
    (r"\.embeddings\.patch_embedding\.", ".patch_embedding."),
    (r"\.pre_layrnorm\.", ".pre_norm."),
    (r"\.post_layernorm\.", ".post_norm."),
    (r"\.encoder\.layers\.", ".transformer."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)
"""What the released file calls a parameter of transformers' vision tower, the fused tensor taken apart."""


class ImageEncoder(Protocol):
    """What turns an image into tokens."""

    def encode(self, image: Tensor) -> Tensor:
        """Tokens [257, C] fp32 of an image, uint8 [H, W, 3]."""


class ClipEncoder:
    """Tokens of an image, before the tower's last layer; an `InputError` if the files cannot be used.

    It works on the CPU, in fp32: a video has one image, and a GPU's memory is for the video.
    """

    def __init__(self, source: Path) -> None:
        transformers = package("transformers", _EXTRA, "an image")
        self._constants = package("transformers.utils.constants", _EXTRA, "an image")
        if source.is_dir():
            self._model = load_pretrained(transformers, "CLIPVisionModel", source, _CLIP, dtype=torch.float32)
            return
        files, network = _released(transformers, source)
        dtypes = dict.fromkeys(network.state_dict(), torch.float32)
        self._model = files.fill(network, dtypes, "cpu", all_used=True, stored_as=released_name)
        for module in self._model.modules():
            if "position_ids" in module._buffers:  # which no file holds
                module.register_buffer("position_ids", torch.arange(IMAGE_TOKENS)[None])

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Tokens [257, C] fp32 of an image, uint8 [H, W, 3], as specification 1.5 says."""
        pixels = image.cpu().permute(2, 0, 1)[None].float() / 127.5 - 1
        side = self._model.config.image_size
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False) / 2 + 0.5
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (self._constants.OPENAI_CLIP_MEAN, self._constants.OPENAI_CLIP_STD)
        )
        states = self._model((pixels - mean) / std, output_hidden_states=True).hidden_states
        return states[-2][0]


def check_image(source: Path) -> int:
    """See that the encoder is there and of 257 tokens; gives the bytes of its weights, errors as in `ClipEncoder`."""
    if source.is_dir():
        return check_encoder(source, _CLIP, words=False)
    files, network = _released(package("transformers", _EXTRA, "an image"), source)
    dtypes = dict.fromkeys(network.state_dict(), torch.float16)
    files.fitting(network, dtypes, all_used=True, stored_as=released_name)
    return source.stat().st_size


def _apart(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower of a released file in the shapes that transformers has."""
    parts: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if _UNUSED.match(name):
            continue
        if fused := _FUSED.fullmatch(name):
            parts |= {f"{fused[1]}{one}.{fused[2]}": part for one, part in zip("qkv", tensor.chunk(3), strict=False)}
        elif name == f"{_SEES}cls_embedding":
            parts[name] = tensor.flatten()
        else:
            parts[name] = tensor[0] if name == f"{_SEES}pos_embedding" and tensor.dim() == 3 else tensor
    return parts


def _released(transformers: Any, source: Path) -> tuple[TorchFile, Any]:
    """A released file, and an empty tower of its shapes; what they do not say is that of ViT-H/14."""
    files = TorchFile(source, convert=_apart)
    stored = files.stored()
    shape = partial(shape_of, stored, f"{source} holds no CLIP image encoder")
    (tokens, width), patch = shape(f"{_SEES}pos_embedding", 2), shape(f"{_SEES}patch_embedding.weight", 4)[-1]
    if tokens != IMAGE_TOKENS:
        raise InputError(f"{source} gives {tokens} tokens of an image, and the model reads {IMAGE_TOKENS}")
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shape(f"{_SEES}transformer.0.mlp.0.weight", 2)[0],
        num_hidden_layers=sum(1 for name in stored if re.fullmatch(r"visual\.transformer\.\d+\.norm1\.weight", name)),
        num_attention_heads=max(1, width // _HEAD),
        image_size=patch * math.isqrt(tokens - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    with torch.device("meta"):
        return files, transformers.CLIPVisionModel(config)

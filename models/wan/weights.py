"""Weights of the causal Wan backbone, under the released names or under those of diffusers (specification 1.2)."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from models.checkpoint import TORCH_SUFFIXES, WHOLE, Loading, Stored, TorchFile, WeightFiles
from models.rewriting import Rules
from models.wan.config import WanConfig
from models.wan.dit import WanDiT

STEMS = ("model", "diffusion_pytorch_model")
"""How files of weights begin, in released folders and in those of diffusers."""
_GENERATORS = ("generator_ema", "generator")  # where Self-Forcing keeps the model in its file
_DIFFUSERS = "condition_embedder."  # begins a name of diffusers

# Its norm3 has no parameters.
diffusers_name = Rules(
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^fps_projection\.0\.", "fps_projection.net.0.proj."),
    (r"^fps_projection\.2\.", "fps_projection.net.2."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.norm3\.", ".norm2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])\.(weight|bias)$", r".to_\1.\2"),
    (r"\.o\.(weight|bias)$", r".to_out.0.\1"),
    (r"\.([kv])_img\.", r".add_\1_proj."),
    (r"\.norm_k_img\.", ".norm_added_k."),
)
"""What diffusers calls a parameter."""


class WanWeights:
    """The stored weights of a DiT.

    Args:
        source: a folder of safetensors, with shards and their index or in one file, as released or as diffusers writes
            it; one such file; or a file of Self-Forcing.
    """

    def __init__(self, source: Path) -> None:
        self._files = weight_files(source)

    def dit(self, config: WanConfig, loading: Loading = WHOLE) -> WanDiT:
        """The DiT, or the stage with the layers that are asked for, all in the dtype of the configuration, ready to
        infer with. Of a whole one, no tensor of the files may be left over; errors as in `WeightFiles.fill`."""
        model, dtypes = empty_dit(config, loading)
        whole = loading.layers is None
        return self._files.fill(model, dtypes, loading.device, all_used=whole, stored_as=self._stored_as())

    def check(self, config: WanConfig) -> dict[str, Stored]:
        """The tensors of a whole DiT, seen to fit the configuration by their headers; errors as in `dit`."""
        model, dtypes = empty_dit(config, WHOLE)
        return self._files.fitting(model, dtypes, all_used=True, stored_as=self._stored_as())

    def _stored_as(self) -> Callable[[str], str]:
        return diffusers_name if any(name.startswith(_DIFFUSERS) for name in self._files.stored()) else str


def weight_files(source: Path) -> WeightFiles:
    """The files of a network: safetensors in a folder, whatever they begin with, or one file."""
    if source.suffix in TORCH_SUFFIXES:
        return TorchFile(source, within=_GENERATORS, prefix="model.")
    stem = next((stem for stem in STEMS if any(source.glob(f"{stem}*.safetensors*"))), STEMS[0])
    return WeightFiles(source, stem=stem)


def empty_dit(config: WanConfig, loading: Loading) -> tuple[WanDiT, dict[str, torch.dtype]]:
    """A DiT on the meta device, and the dtypes that its parameters are used in."""
    with torch.device("meta"):
        model = WanDiT(config, loading)
    return model, dict.fromkeys(model.state_dict(), config.dtype)


@cache  # a batch asks once for each of its lines
def stage_bytes(config: WanConfig, layers: range) -> int:
    """Bytes that the DiT with these layers takes once it is loaded."""
    model, dtypes = empty_dit(config, Loading(layers=layers))
    return sum(tensor.numel() * dtypes[name].itemsize for name, tensor in model.state_dict().items())

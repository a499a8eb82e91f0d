"""Weights of MAGI-1: which tensors a DiT or an autoencoder has, and in which dtypes (specification part 5)."""

import re
from functools import cache

import torch
from torch import Tensor

from models.checkpoint import WHOLE, Loading, Stored, WeightFiles
from models.config import checked, read_json
from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.vae import ViTVAE
from models.protocols import CELL_FRAMES, CELL_PIXELS

_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PROMOTED_PARTS = ("x_embedder.", "y_embedder.", "t_embedder.", "final_linear.", "rope.")
_PROMOTED_NORMS = re.compile(r"\.([qk]_layernorm|self_attn_post_norm|mlp_post_norm|final_layernorm)\.")


class Checkpoint(WeightFiles):
    """Of a DiT as `WeightFiles`; of an autoencoder its released folder, with `config.json` and
    `diffusion_pytorch_model.safetensors`."""

    def dit(self, config: MagiConfig, loading: Loading = WHOLE) -> MagiDiT:
        """The DiT, or the stage with the layers that are asked for, ready to infer with.

        What the released code promotes is fp32 (5.5), fp8 weights and their scales stay as they are, and everything
        else gets the model's dtype, in whichever of the two a checkpoint stores its norms. Of a whole one, no tensor
        of the checkpoint may be left over; errors as in `WeightFiles.fill`.
        """
        model, dtypes = empty_dit(config, loading)
        model = self.fill(model, dtypes, loading.device, all_used=loading.layers is None)
        return model if loading.device == "cpu" else model.fuse()  # on a CPU they stay in the mapped file

    def check_dit(self, config: MagiConfig) -> dict[str, Stored]:
        """The tensors of a whole DiT, seen to fit the configuration by their headers; errors as in `dit`."""
        model, dtypes = empty_dit(config, WHOLE)
        return self.fitting(model, dtypes, all_used=True)

    def vae(self, *, dtype: torch.dtype, device: str = "cpu") -> ViTVAE:
        """The autoencoder of a released folder (1.1), all in one `dtype`, whatever is stored; errors as in `dit`, and
        if it is described as one of another class."""
        vae, weights = self._empty_vae()
        return weights.fill(vae, dict.fromkeys(vae.state_dict(), dtype), device, all_used=True)

    def check_vae(self) -> dict[str, Stored]:
        """The tensors of an autoencoder, seen to fit its description; errors as in `vae`."""
        vae, weights = self._empty_vae()
        return weights.fitting(vae, dict.fromkeys(vae.state_dict(), torch.float32), all_used=True)

    def vae_config(self) -> VaeConfig:
        """The description of an autoencoder; errors as in `vae`."""
        path = self.source / "config.json"
        values = read_json(path, "the autoencoder's configuration")
        for key, known in {"_class_name": "ViTVAE", "model_type": "vit"}.items():
            if values.get(key) != known:
                raise InputError(f"{path}: {key} is {values.get(key)!r}, but only {known!r} is known")
        if not isinstance(values.get("ddconfig"), dict):
            raise InputError(f"{path}: the object ddconfig is missing")
        config = checked(VaeConfig, values["ddconfig"], source=str(path))
        if (config.patch_size, config.patch_length) != (CELL_PIXELS, CELL_FRAMES):
            raise InputError(f"{path}: patch_size must be {CELL_PIXELS} and patch_length {CELL_FRAMES}")
        return config

    def _empty_vae(self) -> tuple[ViTVAE, WeightFiles]:
        with torch.device("meta"):
            return ViTVAE(self.vae_config()), WeightFiles(self.source / _VAE_WEIGHTS)


def dit_dtype(name: str, declared: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter is used in; `dtype` is the model's."""
    if declared.dtype == torch.float8_e4m3fn:
        return declared.dtype
    promoted = name.startswith(_PROMOTED_PARTS) or _PROMOTED_NORMS.search(name) or name.endswith("_scale")
    return torch.float32 if promoted else dtype


@cache  # a batch asks once for each of its lines
def stage_bytes(config: MagiConfig, layers: range) -> int:
    """Bytes that the DiT with these layers takes once it is loaded."""
    model, dtypes = empty_dit(config, Loading(layers=layers))
    return sum(tensor.numel() * dtypes[name].itemsize for name, tensor in model.state_dict().items())


@cache
def vae_parameters(config: VaeConfig) -> int:
    """Parameters of an autoencoder."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in ViTVAE(config).state_dict().values())


def empty_dit(config: MagiConfig, loading: Loading) -> tuple[MagiDiT, dict[str, torch.dtype]]:
    """A DiT on the meta device, and the dtypes that its parameters are used in."""
    with torch.device("meta"):
        model = MagiDiT(config.model_config, loading, fp8=config.engine_config.fp8_quant)
    dtype = config.model_config.dtype
    return model, {name: dit_dtype(name, tensor, dtype) for name, tensor in model.state_dict().items()}

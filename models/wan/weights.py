"""Weights of the causal Wan backbone, under the released names or under those of diffusers (specification 1.2)."""

from __future__ import annotations

import torch

from models.checkpoint import WHOLE, Loading, WeightFiles
from models.wan.config import WanConfig
from models.wan.dit import WanDiT


class WanWeights(WeightFiles):
    """Of a DiT."""

    def dit(self, config: WanConfig, loading: Loading = WHOLE) -> WanDiT:
        """Build the DiT, or the stage with the layers that are asked for, all in the dtype of the configuration.

        Returns:
            The model, ready to infer with. Of a whole one, no tensor of the files may be left over.

        Raises:
            InputError: as `WeightFiles.fill`.
        """
        model, dtypes = empty_dit(config, loading)
        return self.fill(model, dtypes, loading.device, all_used=loading.layers is None)


def empty_dit(config: WanConfig, loading: Loading) -> tuple[WanDiT, dict[str, torch.dtype]]:
    """A DiT on the meta device, and the dtypes that its parameters are used in."""
    with torch.device("meta"):
        model = WanDiT(config, layers=loading.layers, attention=loading.attention)
    return model, dict.fromkeys(model.state_dict(), config.dtype)

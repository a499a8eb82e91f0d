"""How a MAGI-1 model is cut into stages: by hand, or by what its parts cost."""

from __future__ import annotations

from models.magi.config import MagiConfig
from parallel.mesh import Mesh
from parallel.split import balanced_split, modelled_costs, parse_split, stage_layers

__all__ = ["stage_range", "stage_sizes"]

_CELL_PIXELS = 8


def stage_sizes(config: MagiConfig, stages: int, split: str | None = None) -> tuple[int, ...]:
    """Layers of each stage.

    Args:
        config: of the model.
        stages: how many.
        split: what is wanted, as in `9,9,8,8`; None balances modelled costs.

    Raises:
        InputError: the split does not fit, or there are more stages than layers.
    """
    model, runtime = config.model_config, config.runtime_config
    if split is not None:
        return parse_split(split, layers=model.num_layers, stages=stages)
    side = _CELL_PIXELS * model.patch_size
    tokens = runtime.chunk_width * (runtime.video_size_h // side) * (runtime.video_size_w // side)
    ranges = runtime.noise2clean_kvrange or (runtime.window_size,)
    costs = modelled_costs(
        model.num_layers,
        hidden=model.hidden_size,
        feed_forward=model.ffn_hidden_size,
        keys=model.num_query_groups * model.kv_channels,
        patch_values=model.patch_size**2 * model.t_patch_size * model.in_channels,
        gated=model.gated_linear_unit,
        attended=tokens * sum(ranges) / len(ranges),
    )
    return balanced_split(costs, stages)


def stage_range(config: MagiConfig, mesh: Mesh, split: str | None = None) -> range:
    """The layers of a rank's stage; arguments and errors as in `stage_sizes`."""
    return stage_layers(stage_sizes(config, mesh.layout.pp, split), mesh.stage)

"""Floating point operations of MAGI-1's passes, counted from shapes, and an executor that counts while it runs.

A multiplication and an addition are two operations. All matrix products of a pass are counted: embeddings, projections,
attention over the keys that the pass really attended to and over the text, MLP, modulation, head. Norms, softmax,
rotary positions, the distances of reuse policies and the scores of KV compression are not; on magi-pocket a distance is
below one percent of a pass.
"""

from __future__ import annotations

from torch import Tensor

from engine.executor import Admission, Executor
from engine.video import Work
from models.magi.config import ModelConfig

_FREQUENCIES = 256  # sines and cosines of the timestep embedding (specification 6.1)


def pass_flops(config: ModelConfig, *, tokens: int, keys: int, text: int, distilled: bool) -> int:
    """Operations of one pass of one chunk through all layers.

    Args:
        config: shapes of the model.
        tokens: of the chunk.
        keys: that each of them attends to.
        text: caption tokens.
        distilled: the step size is embedded too.
    """
    hidden, keyed = config.hidden_size, config.num_query_groups * config.kv_channels
    cond, text_width = config.cond_size, int(config.hidden_size * config.xattn_cond_hidden_ratio)
    mlp = config.ffn_hidden_size * (3 if config.gated_linear_unit else 2)
    projections = 2 * hidden + 2 * keyed + 2 * hidden  # q, qx; k, v; the two results together
    layer = (
        tokens * hidden * (projections + mlp)
        + text * text_width * 2 * keyed
        + 2 * tokens * hidden * (keys + text)
        + cond * int(2 * hidden * config.cond_gating_ratio)
    )
    patch = config.patch_size**2 * config.t_patch_size
    embedding = tokens * hidden * patch * (config.in_channels + config.out_channels)
    captions = text * config.caption_channels * text_width + config.caption_channels * cond
    times = (_FREQUENCIES + cond) * cond * (2 if distilled else 1)
    return 2 * (config.num_layers * layer + embedding + captions + times)


class CountingExecutor:
    """Runs work where another executor does, and counts it.

    Args:
        inner: where the work is run.
        config: shapes of its model.

    Attributes:
        items: passes so far.
        flops: their operations.
        kv_bytes: KV bytes of the requests that are admitted.
    """

    def __init__(self, inner: Executor, config: ModelConfig) -> None:
        self._inner, self._config = inner, config
        self._admitted: dict[int, Admission] = {}
        self.items = 0
        self.flops = 0

    @property
    def kv_bytes(self) -> int:
        """KV bytes that the admitted requests hold now."""
        return sum(admission.kv.nbytes for admission in self._admitted.values())

    def admit(self, request: int, admission: Admission) -> None:
        """Take a request in."""
        self._admitted[request] = admission
        self._inner.admit(request, admission)

    def release(self, request: int) -> None:
        """Let go of a request."""
        self._admitted.pop(request, None)
        self._inner.release(request)

    def run(self, work: Work) -> Tensor:
        """Run one item and count it."""
        velocity = self._inner.run(work)
        item, admitted = work.item, self._admitted[work.item.request]
        layout = admitted.kv.layout  # as the item has left it, which is as it read it
        tokens = keys = layout.chunk_tokens
        if not item.what.isolated:
            span = layout.span(item.keys_from, item.chunk)
            keys = span.stop - span.start
        self.items += 1
        self.flops += pass_flops(
            self._config,
            tokens=tokens,
            keys=keys,
            text=len(admitted.captions.get(item.what.caption, item.chunks_left)),
            distilled=item.what.condition.distill is not None,
        )
        return velocity

"""Floating point operations of MAGI-1's passes, counted from shapes, and a runner that counts while it runs.

A multiplication and an addition are two operations. All matrix products of a pass are counted: embedding, projections,
attention over the keys that the pass really attended to and over the text, MLP, head. What many passes share is not, as
texts and modulation (`engine/executor.py`), nor are norms, softmax, rotary positions, the distances of reuse
policies and the scores of KV compression; on magi-pocket a distance is below one percent of a pass.
"""

from engine.executor import LocalRunner
from engine.request import Admission
from engine.video import Work
from models.attention import Attention
from models.magi.config import ModelConfig
from models.protocols import CaptionTable, VideoModel


def pass_flops(config: ModelConfig, *, tokens: int, keys: int, text: int, read_out: bool = True) -> int:
    """Operations of one pass of one chunk through all layers, in which each token attends to `keys` and to the `text`.

    Passes that are run for their KV alone have no velocity to `read_out`.
    """
    hidden, keyed = config.hidden_size, config.num_query_groups * config.kv_channels
    mlp = config.ffn_hidden_size * (3 if config.gated_linear_unit else 2)
    projections = 2 * hidden + 2 * keyed + 2 * hidden  # q, qx; k, v; the two results together
    layer = tokens * hidden * (projections + mlp) + 2 * tokens * hidden * (keys + text)
    patch = config.patch_size**2 * config.t_patch_size
    embedding = tokens * hidden * patch * (config.in_channels + config.out_channels * read_out)
    return 2 * (config.num_layers * layer + embedding)


class CountingRunner(LocalRunner):
    """Runs items in this process, and counts them; `config` has the shapes of the model."""

    def __init__(self, model: VideoModel, attention: Attention, config: ModelConfig) -> None:
        super().__init__(model, attention)
        self._config = config
        self._captions: dict[int, CaptionTable] = {}
        self.items = self.flops = 0
        """Passes so far; their operations."""

    @property
    def kv_bytes(self) -> int:
        """KV bytes that the videos in flight hold now."""
        return sum(self.kv(video).nbytes for video in self._captions)

    def admit(self, admission: Admission) -> None:
        super().admit(admission)
        self._captions[admission.video] = admission.captions

    def release(self, video: int) -> None:
        super().release(video)
        self._captions.pop(video, None)

    def begin(self, work: Work) -> None:
        super().begin(work)
        item, layout = work.item, self.kv(work.item.request).layout  # as the item has left it, which is as it read it
        tokens = keys = layout.chunk_tokens
        if not item.what.isolated:
            span = layout.span(item.keys_from, item.chunk)
            keys = span.stop - span.start
        self.items += 1
        self.flops += pass_flops(
            self._config,
            tokens=tokens,
            keys=keys,
            text=len(self._captions[item.request].get(item.what.caption, item.chunk, item.chunks_left).text),
            read_out=bool(item.what.weight),
        )

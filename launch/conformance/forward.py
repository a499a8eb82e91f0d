"""Golden files of one forward of a DiT: `forward`, `released_forward`, of MAGI-1, and `wan_forward`, of SkyReels-V2.

Of MAGI-1 weights are drawn from a seed. The file gives clean chunks that came before, and chunks of the window; each is
run as the engine runs it. Of SkyReels-V2 a mask that is causal by blocks is chunks in order; without one, all latent
frames are one chunk. Every forward in bf16 is made twice: with the attention, and of MAGI-1 the rotary positions, that
the engine has, and with those of the published code.

Shapes: R chunks, S tokens, D hidden, C condition, N text tokens, T h w latent frames and cells.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from launch.conformance.golden import Golden
from models.attention import Attention
from models.config import checked
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.weights import dit_dtype
from models.protocols import Caption, PassCondition
from models.wan.config import IMAGE_TOKENS, SKYREELS, Dtype, WanConfig, shapes_from_dict
from models.wan.dit import WanDiT
from models.wan.weights import WanWeights

_Chunk = Annotated[int, Field(ge=0, le=1_000)]
_Shapes = Mapping[str, tuple[int, ...]]
_WAN_FPS = (16, 24)  # by the published index
Seen = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Keys and values of chunks that were run, by layer and chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunks:
    """Chunks that are run together."""

    source: str  # of errors
    latents: Tensor  # [1, channels, T R, h, w]
    times: Tensor  # [R]
    texts: Sequence[Tensor | None]  # of each chunk, [N, caption channels]; None is the null text
    keys: Sequence[Sequence[int]]  # first chunk that each attends to, and the end
    first: int  # absolute number of the first chunk
    held: range = range(0)  # chunks that were run before

    def __post_init__(self) -> None:
        for chunk, (start, end) in enumerate(self.keys, start=self.first):
            reach = {*self.held, *range(self.first, chunk + 1)}
            if end != chunk + 1 or not 0 <= chunk - start < len(reach) or not reach.issuperset(range(start, end)):
                raise InputError(f"{self.source}: chunk {chunk} cannot attend to the chunks from {start} to {end - 1}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    hidden: list[Tensor]  # after the patch embedding and after each layer [S R, D]
    condition: Tensor  # [R, C]
    texts: list[Tensor]  # of each chunk, [N, D]
    velocity: Tensor  # [1, channels, T R, h, w]


@dataclass(frozen=True, kw_only=True)
class _Forward:
    """A model, what all chunks are told, and the keys and values of chunks that were run."""

    model: MagiDiT
    drop: bool
    distill: float | None
    published: bool  # softmax in fp32 and positions in time as the published code takes them
    seen: Seen = field(default_factory=dict)

    def run(self, what: _Chunks) -> _Made:
        """Run chunks one after another."""
        width = what.latents.shape[2] // len(what.times)
        made = [self._run_chunk(what, index, x) for index, x in enumerate(what.latents.split(width, dim=2))]
        hidden = [torch.cat(parts) for parts in zip(*(one.hidden for one in made), strict=True)]
        velocity = torch.cat([one.velocity for one in made], dim=2)
        condition = torch.cat([one.condition for one in made])
        return _Made(hidden=hidden, condition=condition, texts=[one.texts[0] for one in made], velocity=velocity)

    def _run_chunk(self, what: _Chunks, index: int, x: Tensor) -> _Made:
        model, chunk, (start, end) = self.model, what.first + index, what.keys[index]
        grid, width = (x.shape[2], x.shape[3], x.shape[4]), x.shape[2]
        time = chunk * width + torch.arange(width, dtype=torch.float32, device=model.device)
        if self.published and (last := (what.first + len(what.times)) * width - 1):
            time = time / last * last
        rope = model.rope.table(time, model.token_grid(grid)[1:])
        condition = model.embed_condition(what.times[index].reshape(1, 1), distill=self.distill, null=self.drop)
        caption = what.texts[index]
        text = model.embed_text((model.null_text() if caption is None else caption.float())[None])
        hidden, gates, text_kv = [model.patches(x)], model.gates(condition), model.text_kv(text)
        attention = softmax_in_fp32(model.attention) if self.published else model.attention
        view = View(attention, self.seen, range(start, end))
        for name, layer in model.videodit_blocks.layers.items():
            number = int(name)
            hidden.append(layer(hidden[-1], gates[number], text_kv[number], rope, view, number, attention))
        velocity = model.velocity(hidden[-1], grid)
        return _Made(hidden=[part[0] for part in hidden], condition=condition[0], texts=[text[0]], velocity=velocity)


@dataclass(frozen=True, slots=True)
class View:
    """What a chunk attends to; a `KVView`."""

    attention: Attention
    seen: Seen
    chunks: range  # the last is its own

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.seen[layer, self.chunks[-1]] = k, v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        k, v = zip(*(self.seen[layer, chunk] for chunk in self.chunks), strict=True)
        return self.attention(q, torch.cat(k, dim=1), torch.cat(v, dim=1))


def softmax_in_fp32(attention: Attention) -> Attention:
    """Attention as published, which rounds its result only, and not the weights."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.float(), k.float(), v.float()).to(v.dtype)

    return attend


# ---- kind: forward


@dataclass(frozen=True, kw_only=True, slots=True)
class _ForwardSettings:
    first_chunk: _Chunk
    text: list[Literal["caption", "null"]]
    key_chunks: list[tuple[_Chunk, _Chunk]]
    drop: bool
    distill: float | None
    context_chunks: _Chunk
    token_stride: Annotated[int, Field(ge=1, le=1_000_000)]


def make_forward(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """Hidden states, condition, text and velocity of a case of `forward`; of a base model without a caption too."""
    settings = checked(_ForwardSettings, golden.json("forward"), source=f"{golden.path}: forward")
    config, given, count = golden.config(), len(settings.text), settings.context_chunks
    if len(settings.key_chunks) != given or "caption" not in settings.text:
        raise InputError(f"{golden.path}: forward: each chunk needs a text and key_chunks, and one the caption")
    caption = golden.tensor("input.caption_embs", (None, config.model_config.caption_channels))
    chunks = partial(_Chunks, source=str(golden.path))
    what = chunks(
        latents=_latents(golden, "input.latents", config, given),
        times=golden.tensor("input.t", (given,)),
        texts=[caption if kind == "caption" else None for kind in settings.text],
        keys=settings.key_chunks,
        first=settings.first_chunk,
        held=range(count),
    )
    context = chunks(
        latents=_latents(golden, "input.context_latents", config, count) if count else what.latents,
        times=torch.full((count,), config.runtime_config.clean_t, device=golden.device),
        texts=[None] * count,
        keys=[(chunk, chunk + 1) for chunk in range(count)],
        first=0,
    )
    model, every = _model(golden, config, _pcg_weights), slice(None, None, settings.token_stride)
    for published in (False, True):
        forward = _Forward(model=model, drop=settings.drop, distill=settings.distill, published=published)
        if count:
            yield "output.context.hidden.2", forward.run(context).hidden[2][every]
        made = forward.run(what)
        for number, hidden in enumerate(made.hidden):
            yield f"output.hidden.{number}", hidden[every]
        yield "output.condition", made.condition
        yield "output.text", made.texts[settings.text.index("caption")]
        yield "output.velocity", made.velocity
        if settings.distill is None:
            dropped = replace(forward, drop=True, seen={}).run(replace(what, texts=[None] * given))
            yield "output.null.condition", dropped.condition
            yield "output.null.hidden.2", dropped.hidden[2][every]
            yield "output.null.velocity", dropped.velocity


# ---- kind: released_forward


@dataclass(frozen=True, kw_only=True, slots=True)
class _ReleasedSettings:
    first_chunk: _Chunk
    drop: bool
    context_t: float


def make_released_forward(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """What a case of `released_forward` pins, in bf16, and its velocity with all weights and sums in fp32."""
    settings = checked(_ReleasedSettings, golden.json("forward"), source=f"{golden.path}: forward")
    config, first, times = golden.config(), settings.first_chunk, golden.tensor("input.t", (None,))
    given, chunks = len(times), partial(_Chunks, source=str(golden.path))
    masks = golden.tensor("input.caption_mask", (given, config.model_config.caption_max_length)).bool()
    without, caption = golden.tensor("input.null_text", (given,)).tolist(), _caption(golden)
    context = chunks(
        latents=_latents(golden, "input.context", config, first),
        times=torch.full((first,), settings.context_t, device=golden.device),
        texts=[None] * first,
        keys=golden.tensor("input.context_keys", (first, 2)).tolist(),
        first=0,
    )
    what = chunks(
        latents=_latents(golden, "input.x", config, given),
        times=times,
        texts=[None if dropped else caption[mask] for dropped, mask in zip(without, masks, strict=True)],
        keys=golden.tensor("input.keys", (given, 2)).tolist(),
        first=first,
        held=range(first),
    )
    model = _model(golden, config, _hashed_weights)
    distill = config.runtime_config.num_steps / 2 if config.engine_config.distill else None
    for published in (False, True):
        forward = _Forward(model=model, drop=settings.drop, distill=distill, published=published)
        forward.run(context)
        made = forward.run(what)
        yield "output.embedded", made.hidden[0][:, ::2]
        for number, hidden in enumerate(made.hidden[1:]):
            yield f"output.layer.{number}", hidden[:, ::2]
        yield "output.condition", made.condition
        yield "output.text", made.texts[-1]
        yield "output.velocity", made.velocity
    single = MagiDiT(replace(config.model_config, params_dtype="torch.float32")).to(golden.device)
    single.load_state_dict(model.state_dict())
    forward = _Forward(model=single.requires_grad_(False), drop=settings.drop, distill=distill, published=False)
    forward.run(context)
    yield "output.velocity_fp32", forward.run(what).velocity


def _latents(golden: Golden, name: str, config: MagiConfig, chunks: int) -> Tensor:
    frames, side = chunks * config.runtime_config.chunk_width, config.model_config.patch_size
    latents = golden.tensor(name, (1, config.model_config.latent_channels, frames, None, None))
    if any(size % side for size in latents.shape[3:]):
        raise InputError(f"{golden.path}: {name} has the shape {list(latents.shape)}, not of whole patches")
    return latents


# ---- kind: wan_forward, in fp32, and in bf16 with the casts of the published code


@dataclass(frozen=True, kw_only=True, slots=True)
class _WanCase:
    t: str  # name of a tensor
    fps_index: tuple[Annotated[int, Field(ge=0, le=1)]] = (1,)
    causal_block: _Chunk = 0


def wan_config(golden: Golden) -> WanConfig:
    """The configuration of a case, in the precision that it was run in."""
    shapes = shapes_from_dict(golden.json("config"), source=str(golden.path))
    dtype: Dtype = "bfloat16" if "precision" in golden.metadata else "float32"
    return WanConfig(shapes=shapes, precision=replace(SKYREELS, dtype=dtype))


def make_wan_forward(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """The velocity of every case, and what `mid.` says on the way to that of the first.

    In bf16 each is made twice: with the attention that the engine has, and with that of the published code.
    """
    config = wan_config(golden)
    shapes = config.shapes
    model = WanWeights(golden.path.parent / golden.text("weights")).dit(config).to(golden.device)
    backends = [model.attention]
    if config.dtype == torch.bfloat16:
        backends.append(softmax_in_fp32(model.attention))
    image = golden.tensor("input.clip", (1, IMAGE_TOKENS, shapes.clip_dim))[0] if shapes.sees_image else None
    caption = Caption(golden.tensor("input.context", (1, None, shapes.text_dim))[0], image)
    if not (cases := golden.json("cases")):
        raise InputError(f"{golden.path}: the metadata cases names none")
    size = golden.tensor(f"output.{next(iter(cases))}", (1, shapes.out_dim, None, None, None)).shape
    x = golden.tensor("input.x", size)
    if any(size % 2 for size in x.shape[3:]):
        raise InputError(f"{golden.path}: input.x has the shape {list(x.shape)}, not of whole patches")
    if shapes.sees_image:
        x = torch.cat([x, golden.tensor("input.y", (1, shapes.in_dim - shapes.out_dim, *x.shape[2:]))], dim=1)
    for index, (name, values) in enumerate(cases.items()):
        case = checked(_WanCase, values, source=f"{golden.path}: cases.{name}")
        times = golden.tensor(case.t).flatten().tolist()
        if len(times) not in (1, x.shape[2]):
            raise InputError(f"{golden.path}: {case.t} has {len(times)} times, and input.x {x.shape[2]} frames")
        condition = PassCondition(times=tuple(times), fps=_WAN_FPS[case.fps_index[0]])
        for model.attention in backends:
            hidden, velocity = _run_wan(model, x, condition, caption, case.causal_block or x.shape[2])
            yield f"output.{name}", velocity
            if not index and golden.named("mid."):
                yield from _on_the_way(model, hidden, condition, caption)


def _run_wan(
    model: WanDiT, x: Tensor, condition: PassCondition, caption: Caption, width: int
) -> tuple[Sequence[Tensor], Tensor]:
    """Hidden states before and after each layer [S, D], and the velocity, of chunks of a width in order."""
    seen, hidden, velocities = Seen(), list[list[Tensor]](), list[Tensor]()
    for number, start in enumerate(range(0, x.shape[2], width)):
        part = x[:, :, start : start + width]
        grid = (part.shape[2], part.shape[3], part.shape[4])
        times = condition.times[start : start + width] if len(condition.times) > 1 else condition.times
        told = replace(condition, times=times)
        first = model.patches(part)
        inputs = model.modulation(told), model.text(caption), model.positions(start, grid)
        view = View(model.attention, seen, range(number + 1))
        states = [first, *model.each_layer(first, *inputs, view)]
        hidden.append([state[0] for state in states])
        velocities.append(model.velocity(states[-1], grid, told))
    return [torch.cat(parts) for parts in zip(*hidden, strict=True)], torch.cat(velocities, dim=2)


def _on_the_way(
    model: WanDiT, hidden: Sequence[Tensor], condition: PassCondition, caption: Caption
) -> Iterator[tuple[str, Tensor]]:
    yield "mid.patch", hidden[0]
    for number, state in enumerate(hidden[1:]):
        yield f"mid.block{number}", state
    e, e0 = model.embed_condition(condition)
    yield "mid.time_embedding", e
    yield "mid.e0_per_frame", e0
    yield "mid.text_embedding", model.embed_text(caption.text)[0]


# ---- weights of MAGI-1


def _model(golden: Golden, config: MagiConfig, draw: Callable[[Golden, _Shapes], Iterator[Tensor]]) -> MagiDiT:
    """The case's model, with the weights that `draw` gives in the order of their sorted names.

    An `InputError` if they are not those that the file was made with.
    """
    with torch.device("meta"):
        model = MagiDiT(config.model_config)
    declared = dict(sorted(model.state_dict().items()))
    shapes = {name: tuple(tensor.shape) for name, tensor in declared.items()}
    digest, state = hashlib.sha256(), {}
    for name, values in zip(shapes, draw(golden, shapes), strict=True):
        state[name] = values.to(dit_dtype(name, declared[name], model.config.dtype))
        if name != "rope.bands" or draw is _hashed_weights:
            digest.update(_bytes(state[name]))
    if digest.hexdigest() != golden.text("weights_sha256"):
        raise InputError(f"{golden.path}: the weights of its seed are not those of weights_sha256")
    model.load_state_dict(state, assign=True)
    return model.to(golden.device).requires_grad_(False).eval().fuse()


def _pcg_weights(golden: Golden, shapes: _Shapes) -> Iterator[Tensor]:
    """Of `weights_seed`, by numpy's PCG64: uniform numbers with a mean and a deviation that follow from the name."""
    generator = np.random.PCG64(int(golden.text("weights_seed")))
    rescale = golden.config().model_config.x_rescale_factor
    for name, shape in shapes.items():
        if name == "rope.bands":
            yield golden.tensor("weights.rope.bands", shape).cpu()
            continue
        mean = 1.0 if name.endswith(".layer_norm.weight") else 0.0
        if name == "y_embedder.null_caption_embedding":
            std = 1.0
        elif len(shape) == 1:
            std = 0.1 if name.endswith(".bias") else 0.2
        else:
            std = 1 / math.sqrt(math.prod(shape[1:])) / (rescale if name == "x_embedder.weight" else 1)
        uniform = (generator.random_raw(math.prod(shape)) >> np.uint64(11)) * 2.0**-53
        yield torch.from_numpy((mean + std * math.sqrt(3) * (2 * uniform - 1)).astype(np.float32)).reshape(shape)


def _hashed_weights(golden: Golden, shapes: _Shapes) -> Iterator[Tensor]:
    """Of the seed and the figures in `weights`, by a hash of each element's number."""
    weights = golden.json("weights")
    try:
        seed, figures = int(weights["seed"]), {name: weights["tensors"][name] for name in shapes}
        known = {name: (float(mean), float(std)) for name, (_, _, mean, std) in figures.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{golden.path}: the metadata weights does not fit the configuration: {error}") from None
    for number, (name, shape) in enumerate(shapes.items()):
        if name == "rope.bands":
            yield golden.tensor("weights.rope.bands", shape).cpu()
        else:
            yield _hashed(seed, number, shape, *known[name])


def _caption(golden: Golden) -> Tensor:
    """The table of a caption [L, caption channels] that a case of `released_forward` has in place of a text encoder."""
    figures, shapes = golden.json("caption"), golden.config().model_config
    try:
        drawn = _hashed(
            int(figures["seed"]),
            int(figures["number"]),
            (shapes.caption_max_length, shapes.caption_channels),
            float(figures["mean"]),
            float(figures["std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{golden.path}: the metadata caption lacks a figure: {error}") from None
    if hashlib.sha256(_bytes(drawn)).hexdigest() != golden.text("caption_sha256"):
        raise InputError(f"{golden.path}: the caption of its seed is not that of caption_sha256")
    return drawn.to(golden.device)


def _hashed(seed: int, number: int, shape: tuple[int, ...], mean: float, std: float) -> Tensor:
    """Uniform numbers of a mean and a deviation, fp32; each is a hash of the seed, the number and its own place."""
    start = (seed * 2**48 + number * 2**32 + 1) % 2**64
    z = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(start)  # wraps around, as all that follows
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    whole = ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.int64) - 2**23
    values = whole.astype(np.float32) * np.float32(std * math.sqrt(3) / 2**23) + np.float32(mean)
    return torch.from_numpy(values).reshape(shape)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

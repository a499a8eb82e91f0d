"""How the family is sampled by its configurations; an image to video by a loop of a few lines."""

from dataclasses import replace
from functools import partial

import torch

from engine.engine import Engine
from engine.request import Request
from engine.video import seeded_noise
from models.checkpoint import Loading
from models.protocols import Caption, PassCondition
from models.wan.config import IMAGE_TO_VIDEO, WanRuntime
from models.wan.pipeline import random_pipeline
from models.wan.sampling.forcing import BlockSampling, WindowSampling
from models.wan.sampling.method import sampling_of
from models.wan.sampling.unipc import Sigmas, UniPC
from tests.models.wan.downloaded import SMALL_VAE
from tests.models.wan.small import IMAGE_SHAPES, small_config


def test_each_way_is_the_published_one():
    config = small_config()
    groups = sampling_of(config, 50, clean_pass=False)
    assert isinstance(groups, BlockSampling) and (groups.block, groups.ar_step, groups.window) == (5, 5, 5)
    staggered = replace(config, runtime=WanRuntime(sampling="staggered"))
    assert [sampling_of(staggered, 50, clean_pass=False, given=given).num_steps for given in (0, 5)] == [70, 65]
    image = sampling_of(replace(small_config(IMAGE_SHAPES), runtime=IMAGE_TO_VIDEO), 50, clean_pass=False)
    assert isinstance(image, WindowSampling) and not image.aliased and image.fps is None and image.chunk_width == 25
    assert (image.shift, image.guidance, image.num_steps, image.dtype) == (5.0, 5.0, 50, torch.float32)


def test_an_end_is_seen_as_clean_and_is_no_part_of_the_video():
    runtime = WanRuntime(sampling="window", chunk_width=1, stagger=0, window_frames=3, overlap_frames=1)
    pipeline = random_pipeline(replace(small_config(), runtime=runtime), Loading(), vae=SMALL_VAE)
    asked = partial(Request, prompt="a cat", chunks=1, height=32, width=32, num_steps=3, seed=3)
    first, end = (torch.full((1, 32, 32, 3), grey, dtype=torch.uint8) for grey in (30, 220))
    made = [next(Engine(pipeline).generate(asked(prefix=first, end=one), decode=False)).latents for one in (end, None)]
    latents = torch.cat([pipeline.autoencoder.encode(one) for one in (first, end)], dim=2)

    figures = {"steps": 3, "block": 1, "frames": 3, "noise_condition": 20}
    sampling, model = WindowSampling(**figures, given=1, ends=1), pipeline.model
    assert sampling.times(0) == (20.0, 999.0, 999.0, 0.0)
    drawn = seeded_noise(3)
    draw = lambda number, frames: drawn(0, (1, 16, frames, 4, 4), number)  # noqa: E731
    x = drawn(0, (1, 16, 4, 4, 4), 0)
    x[:, :, :1], x[:, :, 3:] = latents[:, :, :1], latents[:, :, 1:]
    solver, captions = sampling.solver(latents[:, :, :1], draw), pipeline.captions("a cat")
    for step in range(3):
        velocity = 0
        for what in sampling.step_passes(step, oldest=True, text_needed=True):
            text = Caption(captions.text if what.caption == "text" else captions.null)
            inputs = model.modulation(what.condition), model.text(text), model.positions(0, (4, 4, 4))
            patches = model.patches(solver.model_input(x, step))
            hidden = model.layers(patches, *inputs, _Whole(model.attention))
            velocity = velocity + what.weight * model.velocity(hidden, (4, 4, 4), what.condition)
        x = solver.step(x, velocity, step)
    assert made[0].shape == made[1].shape == (1, 16, 3, 4, 4)
    torch.testing.assert_close(made[0], x[:, :, :3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made[0], made[1], rtol=1e-2, atol=1e-2)


class _Whole:
    """Attention over the window alone; a `KVView`."""

    def __init__(self, attention):
        self._attention = attention

    def store(self, layer, k, v):
        self._seen = k, v

    def attend(self, layer, q):
        return self._attention(q, *self._seen)


@torch.no_grad()
def test_an_image_to_video_is_a_plain_loop():
    runtime = replace(IMAGE_TO_VIDEO, window_frames=3)
    config = replace(small_config(IMAGE_SHAPES), runtime=runtime)
    pipeline = random_pipeline(config, Loading(), vae=SMALL_VAE)
    picture = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    request = Request(prompt="a cat", chunks=1, height=32, width=32, num_steps=4, seed=3, prefix=picture)
    (chunk,) = Engine(pipeline).generate(request, decode=False)

    model, vae, sigmas = pipeline.model, pipeline.autoencoder, Sigmas(4, 5.0)
    video = torch.full((9, 32, 32, 3), 127.5)  # which is zero
    video[0] = picture[0].float()
    seen = (
        vae.network.encode((video / 127.5 - 1).permute(3, 0, 1, 2)[None]).latent_dist.mode() - vae._mean
    ) * vae._scale
    marks = torch.zeros(1, 4, 3, 4, 4)
    marks[:, :, 0] = 1
    tokens, captions = pipeline._images.encode(picture[0]), pipeline.captions("a cat")
    x, solver = seeded_noise(3)(0, (1, 16, 3, 4, 4), 0), UniPC(sigmas, aliased=False)
    for step, time in enumerate(sigmas.timesteps):
        condition, velocities = PassCondition(times=(float(time),)), []
        for text in (captions.text, captions.null):
            inputs = model.modulation(condition), model.text(Caption(text, tokens)), model.positions(0, (3, 4, 4))
            hidden = model.layers(model.patches(torch.cat([x, marks, seen], dim=1)), *inputs, _Whole(model.attention))
            velocities.append(model.velocity(hidden, (3, 4, 4), condition))
        positive, negative = velocities
        x = solver.step(x, negative + 5.0 * (positive - negative), step)
    torch.testing.assert_close(chunk.latents, x, rtol=1e-4, atol=1e-4)

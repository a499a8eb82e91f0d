"""magi-pocket: its words, its clips, and its training."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.attention import attention_backend
from models.errors import InputError
from models.pocket.clips import SIDE, SPEED, draw_background, draw_objects, render
from models.pocket.preset import POCKET_DIT, WEIGHTS
from models.pocket.text import (
    CAPTION_CHANNELS,
    COLOURS,
    MOTIONS,
    SHAPES,
    VOCABULARY,
    Scene,
    encode_prompt,
    parse_prompt,
)
from models.pocket.train import latent_statistics, normalise_latents
from models.pocket.train_dit import WINDOW_KINDS, Latents, new_dit, window_loss, window_velocity
from models.pocket.train_vae import new_vae, tiles
from models.pocket.trainer import Run, Trainer, linear_decay

scenes = st.builds(
    Scene, colour=st.sampled_from(list(COLOURS)), shape=st.sampled_from(SHAPES), motion=st.sampled_from(list(MOTIONS))
)


@given(scenes)
def test_a_scene_survives_its_prompt(scene):
    assert parse_prompt(scene.prompt) == scene
    assert parse_prompt(scene.prompt.upper() + ".") == scene


@given(scenes, scenes)
def test_different_scenes_have_different_captions(one, other):
    same = torch.equal(encode_prompt(one.prompt), encode_prompt(other.prompt))
    assert same == (one == other)
    assert encode_prompt(one.prompt).shape == (5, CAPTION_CHANNELS)


def test_an_unknown_word_is_named_and_the_known_ones_are_listed():
    with pytest.raises(InputError, match="'purple'") as caught:
        parse_prompt("a purple circle moving left")
    assert all(word in str(caught.value) for word in VOCABULARY[1:])
    with pytest.raises(InputError, match="did you mean 'circle'"):
        parse_prompt("a red cirle moving left")


@pytest.mark.parametrize(
    "prompt", ["a red moving left", "circle moving left", "a red circle", "a red blue circle still"]
)
def test_a_prompt_must_say_colour_shape_and_motion_once(prompt):
    with pytest.raises(InputError, match="colour|shape|motion"):
        parse_prompt(prompt)


def test_motion_is_constant_and_wraps_around():
    generator = torch.Generator().manual_seed(0)
    objects, background = draw_objects(12, 1, generator, varied=False), draw_background(12, generator)
    first = render(objects, background, 1)
    around = render(objects, background, 1, start=SIDE / SPEED)
    assert torch.allclose(first, around, atol=1e-4)
    moved = render(objects, background * 0, 9)[:, :, 8]
    for index, motion in enumerate(objects.motion[:, 0].tolist()):
        dx, dy = list(MOTIONS.values())[motion]
        start = render(objects, background * 0, 1)[index, :, 0]
        assert torch.allclose(moved[index], start.roll((8 * dy, 8 * dx), dims=(1, 2)), atol=1e-4)


@pytest.mark.parametrize("new", [new_vae, new_dit])
def test_a_seed_sets_every_weight(new):
    one, two = new(3).state_dict(), new(3).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_normalising_latents_changes_no_picture():
    vae, generator = new_vae(0), torch.Generator().manual_seed(1)
    video = tiles(5, generator)
    with torch.no_grad():
        before = vae.decode(vae.encode(video))
        normalise_latents(vae, *latent_statistics(vae, 2, batches=1, batch=10))
        after = vae.decode(vae.encode(video))
    assert torch.allclose(before, after, atol=1e-3)
    mean, covariance = latent_statistics(vae, 2, batches=1, batch=10)
    assert mean.abs().max() < 1e-3
    assert covariance.diagonal().mean().item() == pytest.approx(1, abs=1e-3)


class OneChunkView:
    """Keys and values of the chunks before, kept by hand."""

    def __init__(self, past):
        self.past, self.attention = past, attention_backend("sdpa")

    def store(self, layer, k, v):
        held = self.past.get(layer)
        self.past[layer] = (k, v) if held is None else (torch.cat([held[0], k], 1), torch.cat([held[1], v], 1))

    def attend(self, layer, q):
        return self.attention(q, *self.past[layer])


def test_training_sees_windows_as_inference_does():
    """One forward over a window equals chunk after chunk with keys and values of the past."""
    torch.manual_seed(0)
    dit = new_dit(0)
    torch.nn.init.normal_(dit.final_linear.linear.weight, std=0.1)
    x, t = torch.randn(1, 3, 16, 6, 8, 8), torch.tensor([[0.9999, 0.4, 0.05]])
    caption = encode_prompt("a red circle moving left")[None]
    with torch.no_grad():
        whole = window_velocity(dit, x, t, caption, clean=1, distill=torch.tensor([8.0]), drop=False)
        past: dict = {}
        for chunk in range(3):
            text = dit.embed_text(dit.null_text()[None] if chunk == 0 else caption)
            condition = dit.embed_condition(t[:, chunk : chunk + 1], distill=8.0, null=False)
            rope = dit.rope.table(6.0 * chunk + torch.arange(6), (4, 4))
            told = dit.gates(condition), dit.text_kv(text), (rope,)
            hidden = dit.layers(dit.patches(x[:, chunk]), *told, OneChunkView(past))
            alone = dit.velocity(hidden, (6, 8, 8))
            assert torch.allclose(whole[:, chunk], alone, atol=1e-4)


@pytest.mark.parametrize("kind", WINDOW_KINDS, ids=lambda kind: f"{kind.clean}+{kind.noisy}")
def test_every_kind_of_window_trains(kind):
    generator = torch.Generator().manual_seed(0)
    latents = Latents(
        chunks=torch.randn(3, 5, 16, 6, 8, 8, generator=generator).half(),
        captions=torch.randn(3, 5, CAPTION_CHANNELS, generator=generator),
    )
    dit = new_dit(0)
    loss = window_loss(dit, latents, replace(kind, batch=2), generator)
    loss.backward()
    # A model that says nothing has the error of noise plus data.
    assert loss.item() == pytest.approx(2, abs=0.3)
    assert dit.final_linear.linear.weight.grad.norm() > 0


def test_shares_of_windows_make_a_whole():
    assert sum(kind.share for kind in WINDOW_KINDS) == pytest.approx(1)


def new_trainer(folder, seed=1):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    schedule = linear_decay(20, warmup=2, hold=0.5)
    run = Run(out=folder, seed=seed, compiled=False, report=lambda _: None)
    return Trainer(run, "x.ckpt", module, [optimizer], schedule, decay=0.9), module


def train(trainer, module, steps):
    def step(generator):
        loss = module(torch.randn(8, 4, generator=generator)).square().mean()
        return loss, {"loss": loss.item()}

    return trainer.train(steps, step)


def test_a_resumed_training_ends_where_an_unbroken_one_does(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(*new_trainer(tmp_path / "whole"), 20)
    for steps in (7, 20):
        parts = train(*new_trainer(tmp_path / "parts"), steps)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    trainer, module = new_trainer(tmp_path)
    train(trainer, module, 2)
    with pytest.raises(ValueError, match="seed 1"):
        new_trainer(tmp_path, seed=2)


def test_shipped_weights_are_small_and_say_how_they_were_made():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    record = json.loads((WEIGHTS / "training.json").read_text())
    assert "models.pocket.train" in record["command"]
    assert record["dit"]["loss"] < 0.3
    assert record["autoencoder"]["psnr"] > 25
    assert POCKET_DIT.num_attention_heads % POCKET_DIT.num_query_groups == 0

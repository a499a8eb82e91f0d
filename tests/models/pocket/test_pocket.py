"""magi-pocket: its words, its clips, and its training."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import attention_backend
from models.checkpoint import Loading
from models.errors import InputError
from models.magi.pipeline import load_pipeline
from models.pocket.clips import REST, SIDE, SPEED, WORLD, draw_panoramas, draw_shapes, render
from models.pocket.latents import Latents, encode_clips
from models.pocket.muon import Muon
from models.pocket.preset import POCKET_DIT, WEIGHTS, pocket_config
from models.pocket.text import CAPTION_CHANNELS, encode_prompt
from models.pocket.train import DIT_WEIGHTS, latent_statistics, main, normalise_latents
from models.pocket.train_dit import new_dit
from models.pocket.train_vae import new_vae, tiles
from models.pocket.trainer import Run, Trainer, linear_decay
from models.pocket.windows import (
    GUIDED_KINDS,
    REFINED_KINDS,
    STEADY_KINDS,
    WINDOW_KINDS,
    Branch,
    Windows,
    choose_branch,
    draw_windows,
    guided_velocity,
    steady_velocity,
    window_loss,
    window_velocity,
)
from models.pocket.words import (
    COLOURS,
    MOTIONS,
    PACES,
    PANS,
    RESTS,
    SHAPES,
    SPEEDS,
    VOCABULARY,
    Panorama,
    Scene,
    parse_prompt,
)

objects = st.builds(
    Scene,
    colour=st.sampled_from(list(COLOURS)),
    shape=st.sampled_from(SHAPES),
    motion=st.sampled_from(sorted(MOTIONS.keys() - {"still"})),
    pace=st.sampled_from(PACES),
)
still = st.builds(Scene, colour=st.sampled_from(list(COLOURS)), shape=st.sampled_from(SHAPES), motion=st.just("still"))
panoramas = st.builds(Panorama, motion=st.sampled_from(PANS), pace=st.sampled_from(list(SPEEDS)))
scenes = objects | still | panoramas


@given(scenes)
def test_a_scene_survives_its_prompt(scene):
    assert parse_prompt(scene.prompt) == scene
    assert parse_prompt(scene.prompt.upper() + ".") == scene


@given(scenes, scenes)
def test_different_scenes_have_different_captions(one, other):
    same = torch.equal(encode_prompt(one.prompt), encode_prompt(other.prompt))
    assert same == (one == other)
    assert encode_prompt(one.prompt).shape == (7, CAPTION_CHANNELS)


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


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a red circle moving left slowly fast", "more than one pace: slowly, fast"),
        ("a red circle standing still slowly", "no pace"),
        ("panning right red", "leave out red"),
        ("panning up", "no motion"),
        ("panning right with rests", "cannot pan 'with rests'"),
    ],
)
def test_paces_and_panoramas_have_their_own_rules(prompt, says):
    with pytest.raises(InputError, match=says):
        parse_prompt(prompt)


def test_what_rests_moves_stands_still_and_goes_on():
    one = draw_shapes(6, 1, torch.Generator().manual_seed(0), varied=False, pace=RESTS).objects
    steps = one.at(torch.arange(4.0 * REST)).diff(dim=2).norm(dim=-1)
    moving = one.motion != list(MOTIONS).index("still")
    between = (steps > 1e-4) & (steps < SPEED - 1e-4)  # a rest begins or ends within this frame
    assert between.sum(-1).max() <= 4
    share = (steps[moving] > SPEED / 2).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("pace", SPEEDS)
def test_a_panorama_closes_on_itself(pace):
    clips = draw_panoramas(4, torch.Generator().manual_seed(0), pace=pace)
    turn = WORLD / SPEEDS[pace]
    first, around = clips.frames(3), clips.frames(3, start=5 * turn)
    assert turn % 4 == 0  # whole latent frames
    assert torch.allclose(first, around, atol=1e-3)
    assert not torch.allclose(first, clips.frames(3, start=turn / 2), atol=0.1)


def test_a_camera_that_pans_moves_what_it_sees_the_other_way():
    clips = draw_panoramas(4, torch.Generator().manual_seed(0))
    start, later = clips.frames(1)[:, :, 0], clips.frames(9)[:, :, 8]
    for index, motion in enumerate(clips.objects.motion[:, 0].tolist()):
        dx = MOTIONS[PANS[motion]][0] * 8
        seen = start[index].roll(-dx, dims=-1)
        inside = slice(8, -8)
        assert torch.allclose(later[index, ..., inside], seen[..., inside], atol=2e-2)


def test_motion_is_constant_and_wraps_around():
    generator = torch.Generator().manual_seed(0)
    clips = draw_shapes(12, 1, generator, varied=False)
    objects, background = clips.objects, clips.background
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


def windows(x, t, caption, *, gap=0.0, kept=None):
    """A batch with the constant of 16 steps."""
    distill = torch.full((len(x),), 8.0)
    return Windows(x=x, t=t, velocity=x, captions=caption, distill=distill, gap=torch.tensor([gap]), kept=kept)


def branch(clean, noisy, **others):
    return Branch(
        **{"clean": clean, "noisy": noisy, "batch": 1, "refreshed": True, "drop": False, "kept": None} | others
    )


def chunk_pass(dit, x, t, caption, first_frame, view, *, null=False):
    """A chunk as inference runs it."""
    text = dit.embed_text(dit.null_text()[None] if null else caption)
    condition = dit.embed_condition(t, distill=8.0, null=False)
    rope = dit.rope.table(first_frame + torch.arange(6.0), (4, 4))
    hidden = dit.layers(dit.patches(x), dit.gates(condition), dit.text_kv(text), (rope,), view)
    return dit.velocity(hidden, (6, 8, 8))


@pytest.fixture
def speaking():
    """A random model whose output is not zero."""
    torch.manual_seed(0)
    dit = new_dit(0)
    torch.nn.init.normal_(dit.final_linear.linear.weight, std=0.1)
    return dit


@pytest.mark.parametrize("gap", [0.0, 64.0])
def test_training_sees_windows_as_inference_does(speaking, gap):
    """One forward over a window equals chunk after chunk with keys and values of the past, of which some may be old."""
    x, t = torch.randn(1, 4, 16, 6, 8, 8), torch.tensor([[0.9999, 0.9999, 0.4, 0.05]])
    caption = encode_prompt("a red circle moving left")[None]
    with torch.no_grad():
        whole = window_velocity(speaking, windows(x, t, caption, gap=gap), branch(2, 2))
        past: dict = {}
        for chunk in range(4):
            clean, first = chunk < 2, 6.0 * chunk + gap * (chunk > 0)
            own: dict = {}  # a clean pass sees its own chunk only
            view = OneChunkView(own if clean else past)
            alone = chunk_pass(speaking, x[:, chunk], t[:, chunk : chunk + 1], caption, first, view, null=clean)
            assert torch.allclose(whole[:, chunk], alone, atol=1e-4)
            for layer, kv in own.items():
                OneChunkView(past).store(layer, *kv)


class SomeOfThePast(OneChunkView):
    """The first chunk is in `past`, of which only some rows are seen, in each layer and head others."""

    def __init__(self, past, kept):
        super().__init__(dict(past))
        index = [layer[..., None].expand(-1, -1, -1, POCKET_DIT.kv_channels) for layer in kept]
        for layer, kv in past.items():
            self.past[layer] = tuple(part.gather(1, index[layer]) for part in kv)


def test_training_sees_a_compressed_past_as_inference_does(speaking):
    x, t = torch.randn(1, 3, 16, 6, 8, 8), torch.tensor([[0.9999, 0.9999, 0.3]])
    caption = encode_prompt("panning left")[None]
    rows = torch.rand(6, 1, 2 * 96, 2).topk(96, dim=2).indices.sort(dim=2).values
    with torch.no_grad():
        whole = window_velocity(speaking, windows(x, t, caption, kept=rows), branch(2, 1, kept=1))
        past: dict = {}
        for chunk in range(2):
            own: dict = {}
            chunk_pass(speaking, x[:, chunk], t[:, :1], caption, 6.0 * chunk, OneChunkView(own), null=True)
            for layer, kv in own.items():
                OneChunkView(past).store(layer, *kv)
        view = SomeOfThePast(past, rows)
        alone = chunk_pass(speaking, x[:, 2], t[:, 2:], caption, 12.0, view)
    assert torch.allclose(whole[:, 2], alone, atol=1e-4)


def random_latents(chunks=17, side=8):
    generator = torch.Generator().manual_seed(0)
    return Latents(
        chunks=torch.randn(len(PACES), 3, chunks, 16, 6, side, side, generator=generator).half(),
        captions=torch.randn(len(PACES), 3, 7, CAPTION_CHANNELS, generator=generator),
    )


class HostReads(TorchDispatchMode):
    """Reads of a tensor by the host, which a GPU that captures a step refuses."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen += str(function).removeprefix("aten.").startswith(("_local_scalar_dense", "nonzero"))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("kept", [1, 4])
def test_whole_frames_are_kept_of_every_chunk_and_by_all_heads(kept):
    one = branch(12, 4, batch=2, kept=kept, frames=True)
    rows = draw_windows(random_latents(), one, torch.Generator().manual_seed(0)).kept
    assert rows.shape == (6, 2, 96 * kept, 2) and torch.equal(rows, rows[:1, :, :, :1].expand_as(rows))
    frames = rows[0, :, ::16, 0] // 16
    assert torch.equal(rows[0, :, :, 0], (frames[..., None] * 16 + torch.arange(16)).flatten(1))
    assert (frames.diff(dim=1) > 0).all() and not torch.equal(*frames)
    per_chunk = torch.nn.functional.one_hot(frames // 6, 12).sum(1)
    assert (per_chunk - kept / 2).abs().max() < 1  # as evenly as it goes


@pytest.mark.parametrize(
    "kind", (*WINDOW_KINDS, GUIDED_KINDS[-1]), ids=lambda kind: f"{kind.clean}+{kind.noisy}of{kind.kept}"
)
@pytest.mark.parametrize("refreshed", [True, False])
def test_every_kind_of_window_trains_and_reads_nothing_back(kind, refreshed):
    one = branch(kind.clean, kind.noisy, refreshed=refreshed and kind.clean > 0, kept=kind.kept, frames=kind.frames)
    dit = new_dit(0)
    with HostReads() as reads:
        drawn = draw_windows(random_latents(side=4), one, torch.Generator().manual_seed(0))
        misled = draw_windows(random_latents(side=4), one, torch.Generator().manual_seed(0), errors=kind.clean > 0)
        loss = window_loss(dit, drawn, one, drawn.velocity)
        guided = window_loss(dit, drawn, one, guided_velocity(new_dit(0), drawn, one))
        steady = window_loss(dit, misled, one, steady_velocity(new_dit(0), misled, one))
        (loss + guided + steady).backward()
    assert not reads.seen
    assert guided == 0  # of the same weights, which say nothing
    assert (steady > 0) == (kind.clean > 0)  # of the data, or likewise
    # A model that says nothing has the error of noise plus data.
    assert loss.item() == pytest.approx(2, abs=0.3)
    assert dit.final_linear.linear.weight.grad.norm() > 0


def test_a_first_chunk_is_guided_away_from_what_is_made_without_its_caption(speaking):
    one = branch(0, 1, batch=32)
    windows = draw_windows(random_latents(), one, torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = window_velocity(speaking, windows, one)
        away = velocity - window_velocity(speaking, windows, replace(one, drop=True))
    guided, early = guided_velocity(speaking, windows, one), windows.t[:, 0] < 0.37
    assert early.any() and not early.all() and away.abs().mean() > 1e-3
    torch.testing.assert_close(guided[early], (velocity + 0.5 * away)[early])
    assert torch.equal(guided[~early], velocity[~early])


@pytest.mark.parametrize(("clean", "noisy"), [(0, 2), (1, 4)])
def test_no_other_window_is_guided(speaking, clean, noisy):
    one = branch(clean, noisy)
    windows = draw_windows(random_latents(), one, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(guided_velocity(speaking, windows, one), window_velocity(speaking, windows, one)[:, clean:])
        known = guided_velocity(speaking, windows, one)
        assert window_loss(speaking, windows, one, known) == 0  # it knows already what it is to learn


@pytest.mark.parametrize("refreshed", [True, False])
def test_the_velocity_leads_out_of_an_error_that_stands_still(refreshed):
    """Finished chunks have all of it, those on their way a part, and those that are nearly done keep theirs."""
    one = branch(2, 4, batch=64, refreshed=refreshed)
    plain, misled = (
        draw_windows(random_latents(), one, torch.Generator().manual_seed(0), errors=errors) for errors in (False, True)
    )
    assert torch.equal(plain.t, misled.t) and not torch.equal(plain.x, misled.x)
    t = plain.t[..., None, None, None, None]
    error = (misled.x - plain.x) / t.clamp(min=1e-3)  # [B, R, 16, 6, h, w]
    torch.testing.assert_close(error, error[:, :, :, :1].expand_as(error), atol=2e-3, rtol=0)
    of_the_past = error[:, :1]
    torch.testing.assert_close(error[:, 1:2], of_the_past, atol=2e-3, rtol=0)
    with_some = of_the_past.abs().mean((1, 2, 3, 4, 5)) > 1e-3
    assert 0.5 < with_some.float().mean() < 0.9 and 0.05 < of_the_past[with_some].std() < 0.5
    begins, ends = (
        (one.x + (1 - t) * torch.cat([one.x[:, :2], one.velocity], dim=1))[:, 2:] for one in (plain, misled)
    )
    late = (plain.t[:, 2:] >= 0.6)[..., None, None, None, None].expand_as(begins)
    assert late.any() and not late.all()
    torch.testing.assert_close(ends[~late], begins[~late], atol=2e-3, rtol=0)
    torch.testing.assert_close((ends - begins)[late], of_the_past.expand_as(begins)[late], atol=2e-3, rtol=0)


def test_first_chunks_stay_as_trained_weights_make_them(speaking):
    for one in (branch(0, 1), branch(0, 4), branch(1, 4)):
        windows = draw_windows(random_latents(), one, torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = windows.velocity if one.clean else window_velocity(speaking, windows, one)
        assert torch.equal(steady_velocity(speaking, windows, one), wanted)


def test_all_kinds_of_window_are_chosen_by_their_shares():
    chosen = [choose_branch(torch.Generator().manual_seed(seed)) for seed in range(3000)]
    for kind in WINDOW_KINDS:
        same = [one for one in chosen if (one.clean, one.noisy, one.kept) == (kind.clean, kind.noisy, kind.kept)]
        assert len(same) / len(chosen) == pytest.approx(kind.share, abs=0.03)


def test_clips_are_encoded_with_what_they_are_told(tmp_path):
    run = new_run(tmp_path)
    latents = encode_clips(new_vae(0), run, count=2, chunks=1)
    assert latents.chunks.shape == (len(PACES), 2, 1, 16, 6, 8, 8)
    known = {encode_prompt(f"panning {motion} {pace}").numpy().tobytes() for motion in PANS for pace in SPEEDS}
    panning = [[caption.numpy().tobytes() in known for caption in of_pace] for of_pace in latents.captions]
    assert [sum(row) for row in panning] == [1, 1, 1, 0]  # a camera knows no rests


@pytest.mark.parametrize("kinds", [WINDOW_KINDS, REFINED_KINDS, GUIDED_KINDS, STEADY_KINDS])
def test_shares_of_windows_make_a_whole(kinds):
    assert sum(kind.share for kind in kinds) == pytest.approx(1)


def new_run(folder, seed=1):
    return Run(out=folder, seed=seed, compiled=False, device=torch.device("cpu"), report=lambda _: None)


def new_trainer(folder, seed=1):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)
    optimizers = [
        Muon([module.weight], lr=0.1, momentum=0.9, weight_decay=0.01),
        torch.optim.AdamW([module.bias], lr=0.1, fused=True),
    ]
    schedule = linear_decay(20, warmup=2, hold=0.5)
    return Trainer(new_run(folder, seed), "x.ckpt", module, optimizers, schedule, decay=0.9), module


def train(trainer, module, steps):
    def loss(size, generator):
        value = module(torch.randn(size, 4, generator=generator)).square().mean()
        return value, {"loss": value.detach()}

    return trainer.train(steps, lambda host: int(torch.randint(1, 9, (1,), generator=host)), loss)


def test_muon_is_that_of_pytorch():
    torch.manual_seed(0)
    shapes = [(8, 4), (4, 8), (8, 4), (6, 6)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    how = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [Muon(ours, **how), torch.optim.Muon(theirs, **how)]
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.05 * (other - 1).norm()  # both iterate in bf16


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


@pytest.mark.slow
def test_the_command_trains_goes_on_and_says_how(tmp_path):
    out, weights = tmp_path / "run", tmp_path / "weights"
    few = ["--weights", weights, "--no-compile", "--clips", 2, "--clip-chunks", 5, "--dit-steps", 1, "--device", "cpu"]
    few += ["--vae-batch", 2, "--blend", 0.5, "--guide-steps", 2, "--steady-steps", 1]
    parts = ["--tiles", 100, "--vae-steps", 1, "--polish-steps", 1]
    main([str(one) for one in ("--out", out, "--seed", 2, *few, *parts)])
    folder = weights / "vae"
    name = "final_linear.linear.weight"
    began = load_file(weights / DIT_WEIGHTS)[name].float()
    main([str(one) for one in ("--out", tmp_path / "more", "--vae", folder, "--refine", "--seed", 3, *few)])
    first, second = json.loads((weights / "training.json").read_text())["runs"]
    assert set(first["last"]) == {"vae", "decoder", "dit", "guided", "steady"}
    assert set(second["last"]) == {"dit", "guided", "steady"}
    assert second["command"].startswith(f"python -m models.pocket.train --vae {folder} --refine --seed 3 ")
    assert second["command"].endswith("--dit-steps 1 --guide-steps 2 --steady-steps 1")
    pipeline = load_pipeline(pocket_config(), weights, Loading())
    trained = torch.load(tmp_path / "more" / "steady.ckpt", weights_only=True)["ema"][name]
    assert torch.equal(pipeline.model.state_dict()[name], began.lerp(trained, 0.5).half().float())
    assert not torch.equal(began, trained)
    main([str(one) for one in ("--out", tmp_path / "more", "--vae", folder, "--refine", "--seed", 3, "--export", *few)])
    assert len(json.loads((weights / "training.json").read_text())["runs"]) == 2  # exported again, it is one run
    with pytest.raises(SystemExit):
        main(["--refine"])


def test_shipped_weights_are_small_and_say_how_they_were_made():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    runs = json.loads((WEIGHTS / "training.json").read_text())["runs"]
    assert all("models.pocket.train" in run["command"] for run in runs)
    assert [run["last"]["dit"]["loss"] for run in runs if "dit" in run["last"]][-1] < 0.3
    assert [run["last"]["decoder"]["psnr"] for run in runs if "decoder" in run["last"]][-1] > 38
    assert POCKET_DIT.num_attention_heads % POCKET_DIT.num_query_groups == 0

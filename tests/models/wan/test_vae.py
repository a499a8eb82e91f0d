"""Wan 2.1's autoencoder: both layouts, chunk by chunk as at once, and what is damaged."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from engine.decoder import Decoder
from models.errors import InputError
from models.wan.vae import WanVAE, WanVaeFiles, released_name
from tests.models.wan.downloaded import SMALL_VAE, small_vae

pytestmark = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")


@pytest.fixture(scope="module")
def vae():
    return WanVAE(small_vae(), SMALL_VAE)


def latents(frames):
    return torch.randn(1, 16, frames, 3, 4, generator=torch.Generator().manual_seed(1))


def test_a_video_is_decoded_chunk_by_chunk_as_it_is_at_once(vae):
    z = latents(7)
    whole = vae.stream()(z)
    assert whole.shape == (25, 24, 32, 3) and whole.dtype == torch.uint8 and whole.float().std() > 5
    scale = (
        torch.tensor(SMALL_VAE.latents_std).view(1, -1, 1, 1, 1),
        torch.tensor(SMALL_VAE.latents_mean).view(1, -1, 1, 1, 1),
    )
    theirs = vae.network.decode(z * scale[0] + scale[1]).sample
    assert (((theirs[0] / 2 + 0.5) * 255).permute(1, 2, 3, 0) - whole).abs().max() < 1.01
    for widths in ([1, 2, 2, 2], [3, 3, 1], [7]):
        stream = vae.stream()
        parts = [stream(part) for part in z.split(widths, dim=2)]
        assert [len(part) for part in parts] == [
            4 * width - (3 if not place else 0) for place, width in enumerate(widths)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_a_stream_goes_on_from_its_state(vae):
    z = latents(7)
    for cut in (1, 2, 5):
        first, second = vae.stream(), vae.stream()
        first(z[:, :, :cut])
        second.restore({name: part.clone() for name, part in first.state().items()})
        assert torch.equal(first(z[:, :, cut:]), second(z[:, :, cut:]))


def test_the_decoder_keeps_the_streams_of_videos_apart(vae):
    first, second = latents(4), latents(4).flip(3)
    decoder = Decoder(torch.device("cpu"), on_decoded=lambda began: None, check=lambda: None)
    for video in range(2):
        decoder.begin(video, vae)
    for index in range(2):
        for video, z in enumerate((first, second)):
            decoder.put(video, index, z[:, :, 2 * index : 2 * index + 2])
    for video, z in enumerate((first, second)):
        made = torch.cat([decoder.get(video, wait=True).frames for _ in range(2)])
        assert torch.equal(made, vae.stream()(z))
        decoder.forget(video)
    decoder.begin(0, vae)  # another video of that number begins anew
    decoder.put(0, 0, second[:, :, :2])
    assert torch.equal(decoder.get(0, wait=True).frames, vae.stream()(second[:, :, :2]))
    decoder.close()


def test_what_comes_before_the_first_chunk_is_seen_and_not_shown(vae):
    z = latents(5)
    decoder = Decoder(torch.device("cpu"), on_decoded=lambda began: None, check=lambda: None)
    decoder.begin(0, vae)
    decoder.prime(0, z[:, :, :3])
    kept = decoder.state(0)
    decoder.put(0, 0, z[:, :, 3:])
    assert torch.equal(decoder.get(0, wait=True).frames, vae.stream()(z)[9:])
    assert decoder.get(0, wait=False) is None
    decoder.begin(1, vae)
    decoder.restore(1, kept)  # as from a checkpoint
    decoder.put(1, 0, z[:, :, 3:])
    assert torch.equal(decoder.get(1, wait=True).frames, vae.stream()(z)[9:])
    decoder.close()


def test_frames_become_latents_of_their_last_one_and_fours(vae):
    frames = torch.randint(0, 256, (12, 24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    z = vae.encode(frames)
    assert z.shape == (1, 16, 3, 3, 4) and z.dtype == torch.float32
    assert torch.equal(z, vae.encode(frames[3:]))
    mean, std = (
        torch.tensor(SMALL_VAE.latents_mean).view(1, -1, 1, 1, 1),
        torch.tensor(SMALL_VAE.latents_std).view(1, -1, 1, 1, 1),
    )
    pixels = frames[3:].permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    expected = (vae.network.encode(pixels).latent_dist.mean - mean) / std
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)
    for wrong in (frames[:0], frames[:, :20], frames[:, :, :4]):
        with pytest.raises(InputError):
            vae.encode(wrong)


def released(folder, network):
    torch.save(
        {released_name(name): tensor for name, tensor in network.state_dict().items()}, folder / "Wan2.1_VAE.pth"
    )
    return folder / "Wan2.1_VAE.pth"


def of_diffusers(folder, network):
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    values = json.loads(network.to_json_string())
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("write", [released, of_diffusers])
def test_both_layouts_give_the_same_autoencoder(tmp_path, vae, write):
    source = write(tmp_path, vae.network)
    files = WanVaeFiles(source)
    assert files.config() == SMALL_VAE and len(files.check()) == 194
    assert torch.equal(files.load("cpu").stream()(latents(2)), vae.stream()(latents(2)))


def test_released_names_are_the_published_ones():
    assert {name: released_name(name) for name in PUBLISHED} == PUBLISHED
    names = [released_name(name) for name in small_vae().state_dict()]
    assert len(set(names)) == len(names)


PUBLISHED = {
    "quant_conv.weight": "conv1.weight",
    "post_quant_conv.bias": "conv2.bias",
    "encoder.conv_in.weight": "encoder.conv1.weight",
    "encoder.down_blocks.3.norm1.gamma": "encoder.downsamples.3.residual.0.gamma",
    "encoder.down_blocks.3.conv1.bias": "encoder.downsamples.3.residual.2.bias",
    "encoder.down_blocks.3.conv_shortcut.weight": "encoder.downsamples.3.shortcut.weight",
    "encoder.down_blocks.5.time_conv.weight": "encoder.downsamples.5.time_conv.weight",
    "encoder.down_blocks.5.resample.1.weight": "encoder.downsamples.5.resample.1.weight",
    "decoder.mid_block.resnets.0.norm2.gamma": "decoder.middle.0.residual.3.gamma",
    "decoder.mid_block.attentions.0.to_qkv.weight": "decoder.middle.1.to_qkv.weight",
    "decoder.mid_block.resnets.1.conv2.weight": "decoder.middle.2.residual.6.weight",
    "decoder.up_blocks.1.resnets.2.conv1.weight": "decoder.upsamples.6.residual.2.weight",
    "decoder.up_blocks.1.upsamplers.0.time_conv.bias": "decoder.upsamples.7.time_conv.bias",
    "decoder.norm_out.gamma": "decoder.head.0.gamma",
    "decoder.conv_out.weight": "decoder.head.2.weight",
}


def _config(**values):
    def damage(source):
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


DAMAGE = {
    "another class": (_config(_class_name="AutoencoderKL"), "_class_name is 'AutoencoderKL'"),
    "Wan 2.2": (_config(is_residual=True), "is_residual"),
    "an unknown key": (_config(magic=1), "magic: unknown key"),
    "too few scales": (_config(latents_std=[1.0]), "z_dim numbers"),
    "another width": (_config(base_dim=8), "has shape"),
    "no weights": (lambda source: (source / "diffusion_pytorch_model.safetensors").unlink(), "no weights in"),
    "no description": (lambda source: (source / "config.json").unlink(), "cannot read the autoencoder's config"),
}


@pytest.mark.parametrize(("damage", "said"), list(DAMAGE.values()), ids=list(DAMAGE))
def test_a_damaged_folder_is_one_line(tmp_path, vae, damage, said):
    source = of_diffusers(tmp_path, vae.network)
    damage(source)
    with pytest.raises(InputError, match=said) as caught:
        WanVaeFiles(source).load("cpu")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_released_file_of_something_else_is_one_line(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(InputError, match="no autoencoder of Wan 2.1: it lacks encoder.conv1.weight"):
        WanVaeFiles(tmp_path / "Wan2.1_VAE.pth").load("cpu")

"""The measuring against clips whose truth is known, and the command on the autoencoder that ships."""

import csv

import torch

from benchmarks.common import run_command
from benchmarks.pocket_autoencoder import figures, kinds, run, verdicts


def true_clips():
    drawn = [clips.frames(48) for _, clips in kinds(2, seed=0)]
    return [((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1) for video in drawn]


def failed(spoil):
    return {
        one.name for one in verdicts([figures(clip, spoil(clip.clone())) for clip in true_clips()]) if not one.passed
    }


def jerking(clips):
    """Objects stand still for a latent frame, and then jump."""
    return clips.unflatten(1, (-1, 4))[:, :, :1].expand(-1, -1, 4, -1, -1, -1).flatten(1, 2)


def flashing(clips):
    """Every other tile is a little brighter."""
    clips.unflatten(1, (-1, 24))[:, :, 12:].add_(3)
    return clips


def test_each_figure_fails_with_what_spoils_it():
    inside = "change inside a latent frame over the true one"
    tile, chunk = (f"change into a new {place} over that inside" for place in ("tile", "chunk"))
    assert not failed(lambda clips: clips)
    assert failed(flashing) == {tile, chunk}
    assert inside in failed(jerking)
    assert failed(lambda clips: clips + (8 * torch.rand(clips.shape)).to(torch.uint8)) >= {inside}
    assert failed(lambda clips: clips * 0 + 128) >= {"PSNR", inside}


def test_the_autoencoder_that_ships_is_measured(tmp_path):
    assert run_command(run, "pocket_autoencoder", ["--clips", "1", "--out", str(tmp_path)]) in (0, 1)
    rows = list(csv.DictReader((tmp_path / "pocket_autoencoder.csv").open()))
    assert len(rows) == 7 and all(float(row["PSNR dB"]) > 34 for row in rows)

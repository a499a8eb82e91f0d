"""Train magi-pocket from nothing: autoencoder, normalised latents, DiT, and a last polish of the decoder.

    python -m models.pocket.train --out runs/pocket             everything, about two hours on 2 cores
    python -m models.pocket.train --out runs/pocket --export    write models/pocket/weights from what is there
    python -m models.pocket.train --out runs/decoder --refine   go on with the decoder that ships, and nothing else

It can be stopped at any time; the same command goes on from the last checkpoint. A run is set by its seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.magi.vae import ViTVAE
from models.pocket.preset import WEIGHTS, write_vae_config
from models.pocket.train_dit import Latents, encode_clips, train_dit
from models.pocket.train_vae import POCKET_VAE, polish_decoder, tiles, train_vae
from models.pocket.trainer import Run

WHITENING = 0.5
"""How far latents are whitened: 0 leaves their covariance, 1 makes it the identity."""


@torch.no_grad()
def latent_statistics(vae: ViTVAE, seed: int, *, batches: int = 6, batch: int = 50) -> tuple[Tensor, Tensor]:
    """Mean [z] and covariance [z, z] of the latents' channels over random tiles."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([vae.encode(tiles(batch, generator)) for _ in range(batches)]).transpose(0, 1).flatten(1)
    return z.mean(1), torch.cov(z)


@torch.no_grad()
def normalise_latents(vae: ViTVAE, mean: Tensor, covariance: Tensor) -> None:
    """Fold a linear map of the latents into the encoder's last and the decoder's first layer, which is exact.

    Afterwards latents have mean zero, mean variance one, and a covariance whose spectrum is flattened by `WHITENING`.
    """
    values, vectors = torch.linalg.eigh(covariance)
    scale = values.clamp(min=1e-6) ** (-WHITENING / 2)
    scale = scale / (values * scale.square()).mean().sqrt()
    forward = vectors @ torch.diag(scale) @ vectors.T
    inverse = vectors @ torch.diag(1 / scale) @ vectors.T
    z = len(mean)
    last, first = vae.encoder.last_layer, vae.decoder.proj_in
    last.weight[:z] = forward @ last.weight[:z]
    last.bias[:z] = forward @ (last.bias[:z] - mean)
    first.bias.add_(first.weight @ mean)
    first.weight.copy_(first.weight @ inverse)


def prepare_vae(run: Run, args: argparse.Namespace) -> ViTVAE:
    """The trained autoencoder with normalised latents; from the disk if it is there."""
    path = run.out / "vae.safetensors"
    vae = ViTVAE(POCKET_VAE)
    if not path.exists():
        trained = train_vae(run, steps=args.vae_steps, batch=args.vae_batch)
        vae.load_state_dict(trained.state_dict())
        mean, covariance = latent_statistics(vae, run.seed + 1)
        run.report(f"latent deviations {covariance.diagonal().sqrt().tolist()}")
        normalise_latents(vae, mean, covariance)
        save_half(vae.state_dict(), path)
    vae.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return vae.requires_grad_(False)


def save_half(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights in fp16."""
    save_file({key: value.half().contiguous() for key, value in weights.items()}, path)


def prepare_latents(run: Run, vae: ViTVAE, args: argparse.Namespace) -> Latents:
    """The encoded clips; from the disk if they are there."""
    path = run.out / "latents.safetensors"
    if not path.exists():
        latents = encode_clips(vae, run, count=args.clips, chunks=args.clip_chunks)
        save_file({"chunks": latents.chunks, "captions": latents.captions}, path)
    stored = load_file(path)
    return Latents(chunks=stored["chunks"], captions=stored["captions"])


def export(run: Run, target: Path, args: argparse.Namespace) -> None:
    """Write the weights (fp16) and how they were made."""
    vae = torch.load(run.out / "vae.ckpt", weights_only=True)
    dit = torch.load(run.out / "dit.ckpt", weights_only=True)
    polished = run.out / "vae_polished.safetensors"
    decoder = torch.load(run.out / "decoder.ckpt", weights_only=True) if polished.exists() else None
    folder = target / "inference_weight.distill"
    folder.mkdir(parents=True, exist_ok=True)
    save_half(dit["ema"], folder / "model.safetensors")
    write_vae_config(target / "vae", POCKET_VAE)
    weights = polished if polished.exists() else run.out / "vae.safetensors"
    shutil.copyfile(weights, target / "vae" / "diffusion_pytorch_model.safetensors")
    record = {
        "command": f"python -m models.pocket.train --seed {args.seed} --vae-steps {args.vae_steps} "
        f"--dit-steps {args.dit_steps} --clips {args.clips} --polish-steps {args.polish_steps}",
        "torch": torch.__version__,
        "seed": args.seed,
        "autoencoder": vae["history"][-1],
        "dit": dit["history"][-1],
        "decoder": decoder["history"][-1] if decoder else None,
        "curves": {"autoencoder": vae["history"][::4], "dit": dit["history"][::8]},
    }
    (target / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    run.report(f"wrote {target}: step {dit['step']} of the DiT")


def refine(run: Run, args: argparse.Namespace) -> None:
    """Polish the decoder that ships for so many steps more, and write it; latents and DiT stay as they are."""
    path, record = WEIGHTS / "vae" / "diffusion_pytorch_model.safetensors", WEIGHTS / "training.json"
    start = run.out / "vae.safetensors"  # a run that goes on begins with what it began with
    if not start.exists():
        shutil.copyfile(path, start)
    vae = ViTVAE(POCKET_VAE).requires_grad_(False)
    vae.load_state_dict({key: value.float() for key, value in load_file(start).items()})
    polished = polish_decoder(run, vae, steps=args.polish_steps, batch=args.vae_batch)
    save_half(polished.state_dict(), path)
    history = torch.load(run.out / "decoder.ckpt", weights_only=True)["history"]
    command = f"python -m models.pocket.train --refine --seed {args.seed} --vae-batch {args.vae_batch}"
    values = json.loads(record.read_text())
    values["refined_decoder"] = {
        "command": f"{command} --polish-steps {args.polish_steps}",
        "torch": torch.__version__,
        "last": history[-1],
        "curve": history[::4],
    }
    record.write_text(json.dumps(values, indent=1) + "\n")


def report(line: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.pocket.train", description="Train magi-pocket.")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"), help="checkpoints and latents")
    for name, default, what in (
        ("seed", 1, "of everything that is drawn"),
        ("vae-steps", 1100, "of the autoencoder"),
        ("vae-batch", 20, "tiles"),
        ("clips", 4000, "to encode for the DiT"),
        ("clip-chunks", 5, "length of a clip"),
        ("dit-steps", 4300, "of the DiT"),
        ("polish-steps", 2400, "of the decoder, after the DiT"),
        ("threads", 0, "CPU threads; 0 leaves PyTorch's choice"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile; needs gcc"
    )
    parser.add_argument("--refine", action="store_true", help="only polish the decoder that ships")
    parser.add_argument("--export", action="store_true", help=f"only write {WEIGHTS} from the newest checkpoints")
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    args = _options()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(out=args.out, seed=args.seed, compiled=args.compile, report=report)
    if args.refine:
        return refine(run, args)
    if not args.export:
        vae = prepare_vae(run, args)
        train_dit(run, prepare_latents(run, vae, args), steps=args.dit_steps)
        polished = polish_decoder(run, vae, steps=args.polish_steps, batch=args.vae_batch)
        save_half(polished.state_dict(), run.out / "vae_polished.safetensors")
    export(run, WEIGHTS, args)


if __name__ == "__main__":
    main()

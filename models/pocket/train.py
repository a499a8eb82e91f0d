"""Train magi-pocket from nothing: autoencoder, normalised latents, a polish of the decoder, and the DiT.

    python -m models.pocket.train --out runs/pocket             everything: minutes on a GPU, many hours on 2 cores
    python -m models.pocket.train --out runs/pocket --vae DIR   the same with that autoencoder, whose encoder is kept
    python -m models.pocket.train --out runs/more --vae DIR --refine    go on with the DiT that ships, on a CPU
    python -m models.pocket.train --out runs/pocket --export    write models/pocket/weights from what is there

It can be stopped at any time; the same command goes on from the last checkpoint. A run is set by its seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.magi.vae import ViTVAE
from models.pocket.latents import Latents, encode_clips
from models.pocket.preset import WEIGHTS, write_vae_config
from models.pocket.train_dit import Clips, guide_dit, new_dit, refine_dit, steady_dit, train_dit
from models.pocket.train_vae import POCKET_VAE, polish_decoder, tiles, train_vae
from models.pocket.trainer import Run

DIT_WEIGHTS = Path("inference_weight.distill", "model.safetensors")
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
RECORD = "training.json"
_SHORT = 5  # chunks of the clips that a trained DiT goes on with
WHITENING = 0.5
"""How far latents are whitened: 0 leaves their covariance, 1 makes it the identity."""


@torch.no_grad()
def latent_statistics(vae: ViTVAE, seed: int, *, batches: int, batch: int = 50) -> tuple[Tensor, Tensor]:
    """Mean [z] and covariance [z, z] of the latents' channels over random tiles."""
    generator = torch.Generator(vae.encoder.cls_token.device).manual_seed(seed)
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
    vae = ViTVAE(POCKET_VAE).to(run.device)
    if not path.exists() and args.vae:
        shutil.copyfile(args.vae / VAE_WEIGHTS, path)
    if not path.exists():
        trained = train_vae(run, steps=args.vae_steps, batch=args.vae_batch, pool=args.tiles)
        vae.load_state_dict(trained.state_dict())
        mean, covariance = latent_statistics(vae, run.seed + 1, batches=min(6, max(1, args.tiles // 50)))
        run.report(f"latent deviations {covariance.diagonal().sqrt().tolist()}")
        normalise_latents(vae, mean, covariance)
        save_half(vae.state_dict(), path)
    vae.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return vae.requires_grad_(False)


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors; the file is whole or not there, since what is there is not made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(dict(tensors), part)
    os.replace(part, path)


def save_half(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights in fp16."""
    save({key: value.half().contiguous() for key, value in weights.items()}, path)


def prepare_latents(run: Run, name: str, encode: Callable[[], Latents]) -> Latents:
    """Encoded clips; from the disk if they are there."""
    path = run.out / f"{name}.safetensors"
    if not path.exists():
        latents = encode()
        save({"chunks": latents.chunks, "captions": latents.captions}, path)
    stored = load_file(path, device=str(run.device))
    return Latents(chunks=stored["chunks"], captions=stored["captions"])


def train(run: Run, args: argparse.Namespace, until: float | None) -> None:
    """All parts that are not there yet."""
    vae = prepare_vae(run, args)
    polish_decoder(run, vae, steps=args.polish_steps, batch=args.vae_batch, pool=args.tiles)
    latents = prepare_latents(run, "latents", lambda: encode_clips(vae, run, count=args.clips, chunks=args.clip_chunks))
    leave = 2 * args.guide_steps + args.steady_steps  # a step with a guide has up to two more forwards
    dit = train_dit(run, latents, steps=args.dit_steps, until=until, leave=leave)
    clips = Clips(short=latents, long=latents)
    steady_dit(run, guide_dit(run, dit, clips, steps=args.guide_steps), clips, steps=args.steady_steps)


def refine(run: Run, args: argparse.Namespace) -> None:
    """Go on with the DiT that ships."""
    vae = prepare_vae(run, args)
    encode, seed = partial(encode_clips, vae, run), run.seed + 90
    short = partial(encode, count=args.clips, chunks=_SHORT, panoramas=0.25, seed=seed)
    long = partial(encode, count=max(1, args.clips // 3), chunks=args.clip_chunks, seed=seed + 1)
    start = run.out / "start.safetensors"  # a run that goes on begins with what it began with
    if not start.exists():
        shutil.copyfile(args.weights / DIT_WEIGHTS, start)
    dit = new_dit(run.seed)
    dit.load_state_dict({key: value.float() for key, value in load_file(start).items()})
    clips = Clips(short=prepare_latents(run, "short", short), long=prepare_latents(run, "long", long))
    dit = refine_dit(run, dit, clips, steps=args.dit_steps, rate=args.rate)
    steady_dit(run, guide_dit(run, dit, clips, steps=args.guide_steps), clips, steps=args.steady_steps)


def export(run: Run, target: Path, args: argparse.Namespace) -> None:
    """Write the weights that this run has made (fp16), and how; runs whose weights it began with are named before."""
    states = {
        name: torch.load(path, weights_only=True)
        for name in ("vae", "decoder", "dit", "guided", "steady")
        if (path := run.out / f"{name}.ckpt").exists()
    }
    last = next(name for name in ("steady", "guided", "dit") if name in states)
    dit = states[last]["ema"]
    if args.refine:
        before = load_file(run.out / "start.safetensors")
        dit = {name: before[name].float().lerp(value, args.blend) for name, value in dit.items()}
    save_half(dit, target / DIT_WEIGHTS)
    if "decoder" in states:
        write_vae_config(target / "vae", POCKET_VAE)
        save_half(states["decoder"]["ema"], target / "vae" / VAE_WEIGHTS)
    record = {
        "command": _command(args, {name: state["step"] for name, state in states.items()}),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU",
        "last": {name: state["history"][-1] for name, state in states.items()},
        "curves": {name: state["history"][::4] for name, state in states.items()},
    }
    runs = json.loads((target / RECORD).read_text())["runs"] if args.vae else []
    runs = [*(run for run in runs if run["command"] != record["command"]), record]  # exported again, it is one run
    (target / RECORD).write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    run.report(f"wrote {target}: step {states[last]['step']} of the DiT ({last})")


def _command(args: argparse.Namespace, steps: Mapping[str, int]) -> str:
    """What makes the same weights on the same machine."""
    names = ["seed", "clips", "clip_chunks", "device"]
    names += ["rate", "blend"] if args.refine else ["vae_batch", "tiles", "polish_steps"]
    names += [] if args.vae else ["vae_steps"]
    how = [f"--vae {args.vae}" if args.vae else "", "--refine" if args.refine else ""]
    how += [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names]
    how += [
        f"--{option}-steps {steps.get(name, 0)}"
        for option, name in (("dit", "dit"), ("guide", "guided"), ("steady", "steady"))
    ]
    return " ".join(["python -m models.pocket.train", *filter(None, how)])


def report(line: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.pocket.train", description="Train magi-pocket.")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"), help="checkpoints and latents")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the weights that are written")
    for name, default, what in (
        ("seed", 1, "of everything that is drawn"),
        ("vae-steps", 15000, "of the autoencoder"),
        ("vae-batch", 48, "tiles"),
        ("tiles", 20000, "to train the autoencoder on, and to polish its decoder"),
        ("clips", 3500, "of each pace to encode for the DiT"),
        ("clip-chunks", 17, "length of a clip"),
        ("dit-steps", 60000, "of the DiT"),
        ("polish-steps", 8000, "of the decoder alone"),
        ("guide-steps", 800, "in which the DiT learns to be guided"),
        ("steady-steps", 2000, "in which the DiT learns not to go on from errors"),
        ("threads", 0, "CPU threads; 0 leaves PyTorch's choice"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, help="of all of it: as many steps of the DiT as fit into what is left")
    parser.add_argument("--vae", type=Path, help="folder of a trained autoencoder to begin with")
    parser.add_argument("--refine", action="store_true", help="go on with the DiT of --weights; with --vae")
    parser.add_argument(
        "--rate", type=float, default=0.35, help="with --refine: learning rates, as a share of the first"
    )
    parser.add_argument("--blend", type=float, default=1.0, help="share of the refined weights in what is written")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile; needs gcc"
    )
    parser.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=True, help="capture steps as CUDA graphs on a GPU"
    )
    parser.add_argument("--export", action="store_true", help="only write the weights of the newest checkpoints")
    args = parser.parse_args(arguments)
    if args.refine and not args.vae:
        parser.error("--refine needs --vae, the autoencoder whose latents the DiT knows")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    began = time.monotonic()
    args = _options(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True  # shapes never change
    device = torch.device(args.device)
    captured = args.graphs and device.type == "cuda"
    run = Run(out=args.out, seed=args.seed, compiled=args.compile, captured=captured, device=device, report=report)
    if args.refine and not args.export:
        refine(run, args)
    elif not args.export:
        train(run, args, None if args.minutes is None else began + 60 * args.minutes)
    export(run, args.weights, args)


if __name__ == "__main__":
    main()

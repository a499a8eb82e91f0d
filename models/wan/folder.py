"""Folders of SkyReels-V2 and Self-Forcing as they are downloaded: which model it is, and where its parts are.

Three layouts: as SkyReels-V2 is released, as diffusers has it, and a file of Self-Forcing with the parts of Wan 2.1
around it. Only names, descriptions and headers are read here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from models.checkpoint import Stored, first_with, shape_of
from models.config import checked, read_json
from models.errors import InputError
from models.wan.config import (
    CAUSAL_WAN,
    IMAGE_TO_VIDEO,
    SELF_FORCING,
    SKYREELS,
    WanConfig,
    WanRuntime,
    WanShapes,
    shapes_from_dict,
)
from models.wan.image import IMAGE_FOLDER, RELEASED_CLIP
from models.wan.text import RELEASED_TEXT, RELEASED_TOKENIZER
from models.wan.vae import RELEASED_VAE
from models.wan.weights import weight_files

_TRANSFORMER = "transformer"
_PARTS = "wan_models/Wan2.1-T2V-1.3B"  # where Self-Forcing's instructions put autoencoder and encoder
_HEAD = 128  # channels of a head of Wan, which no tensor's shape says
_LAYER = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class WanFiles:
    """Where the parts of a model are."""

    dit: Path  # folder or file of the DiT's weights
    vae: Path  # the released file, or a folder of diffusers
    text: Path  # UMT5, likewise
    tokenizer: Path  # folder of its vocabulary
    image: Path | None = None  # of a model that sees an image: CLIP, likewise


def holds_model(folder: Path) -> bool:
    """Whether a folder looks like one of this family."""
    if (folder / _TRANSFORMER / "config.json").is_file() or _generators(folder):
        return True
    path = folder / "config.json"
    return path.is_file() and "model_type" in path.read_text(errors="replace")


def recognise(folder: Path) -> WanConfig:
    """The configuration of the model in a downloaded folder; an `InputError` if there is none, or several."""
    generators = _generators(folder)
    if len(generators) > 1:
        raise InputError(f"{folder} holds {' and '.join(path.name for path in generators)}: keep one of them")
    described = folder / _TRANSFORMER / "config.json"
    if not described.is_file():
        described = folder / "config.json"
    if described.is_file():
        large = "720p" in folder.absolute().name.lower()
        shapes = shapes_from_dict(read_json(described, "the configuration"), source=str(described))
        runtime = IMAGE_TO_VIDEO if shapes.sees_image else WanRuntime()
        if large:
            runtime = replace(runtime, height=720, width=1280)
        return WanConfig(shapes=shapes, precision=SKYREELS, runtime=runtime)
    if generators:
        shapes = _shapes_of(weight_files(generators[0]).stored(), generators[0])
        return WanConfig(shapes=shapes, precision=CAUSAL_WAN, runtime=SELF_FORCING)
    raise InputError(f"{folder} holds no model: it needs config.json, {_TRANSFORMER}, or a file of Self-Forcing (*.pt)")


def find_files(config: WanConfig, folder: Path) -> WanFiles:
    """Find the parts of a model; an `InputError` names all that are missing, with the places that were searched.

    Those of a released model are searched in the folder, one folder up, and where the instructions of Self-Forcing put
    them.
    """
    missing: list[str] = []
    image, sees = None, config.shapes.sees_image
    if (folder / _TRANSFORMER).is_dir():
        vae = first_with([folder / "vae"], "config.json", "autoencoder (a folder with config.json)", missing)
        text = first_with([folder / "text_encoder"], "config.json", "UMT5 encoder (a folder with config.json)", missing)
        words = first_with([folder], "tokenizer", "folder tokenizer", missing)
        dit, tokenizer = folder / _TRANSFORMER, None if words is None else words / "tokenizer"
        if sees:
            what = "CLIP image encoder (a folder with config.json)"
            image = first_with([folder / IMAGE_FOLDER], "config.json", what, missing)
    else:
        generators, up = _generators(folder), folder.absolute().parent
        dit = generators[0] if generators else folder
        around = [folder, folder / _PARTS, up, up / _PARTS]
        names = (RELEASED_VAE, RELEASED_TEXT, RELEASED_TOKENIZER, *([RELEASED_CLIP] if sees else []))
        found = [(first_with(around, name, name, missing), name) for name in names]
        vae, text, tokenizer, *images = (None if place is None else place / name for place, name in found)
        image = images[0] if images else None
    if missing:
        raise InputError(f"{folder} is not complete: {'; '.join(missing)}")
    assert vae is not None and text is not None and tokenizer is not None
    return WanFiles(dit=dit, vae=vae, text=text, tokenizer=tokenizer, image=image)


def dit_source(folder: Path) -> Path:
    """The folder or the file of the DiT's weights; an `InputError` if there is no folder."""
    if not folder.is_dir():
        raise InputError(f"cannot read the weights: there is no folder {folder}")
    if (folder / _TRANSFORMER).is_dir():
        return folder / _TRANSFORMER
    return next(iter(_generators(folder)), folder)


def _generators(folder: Path) -> list[Path]:
    """Files of Self-Forcing."""
    return sorted(folder.glob("*.pt")) or sorted(folder.glob("checkpoints/*.pt"))


def _shapes_of(stored: Mapping[str, Stored], source: Path) -> WanShapes:
    """Shapes as the tensors have them."""
    shape = partial(shape_of, stored, f"{source} holds no causal Wan")
    dim, channels, *_ = shape("patch_embedding.weight", 5)
    values = {
        "model_type": "t2v",
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "num_heads": max(1, dim // _HEAD),
        "num_layers": len({found[1] for name in stored if (found := _LAYER.match(name))}),
        "in_dim": channels,
        "out_dim": shape("head.head.weight", 2)[0] // 4,
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
    }
    return checked(WanShapes, values, source=str(source))

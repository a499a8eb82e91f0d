"""Folders of MAGI-1 as they are downloaded: which model it is, and where its autoencoder, T5 and special tokens are.

Only names and headers of files are read here (specification part 5); weights are read in `models/magi/weights.py`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from models.checkpoint import INDEX, SINGLE, Stored, first_with
from models.config import read_json
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.presets import POCKET, find_preset, released_config
from models.magi.text import T5_FOLDER
from models.magi.weights import Checkpoint

SPECIAL_TOKENS = "special_tokens.npz"
_INNER = ("inference_weight", "inference_weight.distill", "inference_weight.fp8.distill", "inference_weight.fp8")
_LAYER = re.compile(r"videodit_blocks\.layers\.(\d+)\.")
_FIRST = "videodit_blocks.layers.0."
_PACKED = "videodit_blocks.layers.self_attention.linear_qkv.weight"  # the layers in one tensor: MAGI-1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """Where the parts of a model are."""

    dit: Path  # folder of the DiT's weights
    vae: Path  # folder of the autoencoder
    t5: Path | None = None  # folder that holds `t5-v1_1-xxl`; None for a model with a vocabulary of its own
    tokens: Path | None = None  # special_tokens.npz, likewise


def find_files(config: MagiConfig, weights: Path | None, *, tokens: Path | None = None) -> ModelFiles:
    """Find the parts of a model; an `InputError` names those that are missing, and the places that were searched.

    Args:
        config: of the model. One without T5 is magi-pocket's, which has a fixed vocabulary.
        weights: folder of the DiT in place of the configuration's `load`. The autoencoder is searched in `vae` in it,
            beside it and one folder up (`ckpt/vae`), then where the configuration says; T5 likewise in `t5`.
        tokens: `special_tokens.npz`, in place of the one in the folder or in `example/assets` of a checkout around it
            or around the working directory.
    """
    runtime = config.runtime_config
    dit = dit_folder(config, weights)
    root = weights or Path(runtime.load or "")
    around = [root, root.absolute().parent, root.absolute().parent.parent]
    if root.name in _INNER:
        around.append(root.absolute().parents[2])
    vaes = [folder / "vae" for folder in around] + _given(runtime.vae_pretrained)
    missing: list[str] = []
    vae = first_with(vaes, "config.json", "autoencoder (a folder with config.json)", missing)
    t5, found = None, None
    if runtime.t5_pretrained is not None:
        t5s = [folder / "t5" for folder in around] + _given(runtime.t5_pretrained)
        t5 = first_with(t5s, T5_FOLDER, f"T5 encoder (a folder with {T5_FOLDER})", missing)
        assets = [folder / "example" / "assets" for folder in (*root.absolute().parents, Path())]
        places = [tokens.parent] if tokens is not None else [root, *assets]
        name = SPECIAL_TOKENS if tokens is None else tokens.name
        folder = first_with(places, name, name, missing)
        found = None if folder is None else folder / name
    if missing:
        raise InputError(f"{root} is not complete: {'; '.join(missing)}")
    assert vae is not None
    return ModelFiles(dit=dit, vae=vae, t5=t5, tokens=found)


def _given(path: str | None) -> list[Path]:
    return [] if path is None else [Path(path)]


def dit_folder(config: MagiConfig, weights: Path | None) -> Path:
    """The folder of the DiT's weights: inside `weights`, or the configuration's `load`, the one of its kind (5.1), else
    that folder itself. An `InputError` if there is none."""
    if weights is None and config.runtime_config.load is None:
        raise InputError("the configuration has no load: give --weights DIR")
    root = weights or Path(config.runtime_config.load or "")
    if not root.is_dir():
        raise InputError(f"cannot read the weights: there is no folder {root}")
    kind = (".fp8" if config.engine_config.fp8_quant else "") + (".distill" if config.engine_config.distill else "")
    inner = root / f"inference_weight{kind}"
    return inner if inner.is_dir() else root


# ---- which model a folder holds


def recognise(folder: Path) -> MagiConfig:
    """The configuration of the model in a downloaded folder, such as `ckpt/magi/4.5B_distill`.

    A `config.json` in it with the three objects of a released configuration is taken as it is. Else the kind is in the
    names of folders and tensors, the sizes are in the shapes, and all else is as in the released file of that kind.

    An `InputError` if there is no model in it, or several, or one that is not known.
    """
    described = folder / "config.json"
    if described.is_file():
        values = read_json(described, "the configuration")
        if {"model_config", "runtime_config", "engine_config"} & set(values):  # else it is of another tool
            return MagiConfig.from_dict(values, source=str(described))
    inner = [folder / name for name in _INNER if (folder / name).is_dir()]
    if len(inner) > 1:
        names = " and ".join(path.name for path in inner)
        raise InputError(f"{folder} holds {names}: say which with --model, or give one of these folders")
    dit = inner[0] if inner else folder
    if not (dit / INDEX).is_file() and not (dit / SINGLE).is_file():
        raise InputError(f"{folder} holds no model: {_advice(folder)}")
    stored = Checkpoint(dit).stored()
    # Base and distilled models have the same tensors: the name of the folder tells (5.1).
    quantised = any(name.endswith("weight_scale") for name in stored)
    distilled = quantised or "distill" in dit.name or (not inner and "distill" in dit.absolute().name)
    config, pocket = _config_of(stored, folder, distilled=distilled, quantised=quantised), find_preset(POCKET).config()
    same = replace(config.model_config, params_dtype=pocket.model_config.params_dtype) == pocket.model_config
    return replace(pocket, runtime_config=replace(pocket.runtime_config, load=str(folder))) if same else config


def _advice(folder: Path) -> str:
    models = {
        found.parent
        for depth in ("*", "magi/*", "ckpt/magi/*")
        for name in _INNER
        for found in folder.glob(f"{depth}/{name}")
    }
    if models:
        return f"give one of {', '.join(map(str, sorted(models)))}"
    return f"it needs a folder {_INNER[0]}, or {INDEX} with its shards, or {SINGLE}"


def _config_of(stored: Mapping[str, Stored], folder: Path, *, distilled: bool, quantised: bool) -> MagiConfig:
    """The released configuration of a kind, with the sizes that the shapes say (5.2)."""
    if _PACKED in stored:
        raise InputError(f"{folder} holds MAGI-1.1, whose layers are packed in a way that is not published")
    layers = {int(found[1]) for name in stored if (found := _LAYER.match(name))}

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in stored:
            raise InputError(f"{folder} holds no MAGI-1 model: it lacks {name}")
        found = stored[name].shape
        if len(found) != dimensions or not all(found):
            raise InputError(f"{folder}: {name} has shape {list(found)}, which no MAGI-1 model has")
        return found

    width, channels, _, patch, _ = shape("x_embedder.weight", 5)
    cond = shape("t_embedder.mlp.2.weight", 2)[0]
    captions, caption_channels = shape("y_embedder.null_caption_embedding", 2)
    text = shape("y_embedder.y_proj_xattn.0.weight", 2)[0]
    head = shape(_FIRST + "self_attention.q_layernorm.weight", 1)[0]
    queries = shape(_FIRST + "self_attention.linear_qkv.q.weight", 2)[0]
    keys = shape(_FIRST + "self_attention.linear_qkv.k.weight", 2)[0]
    gates = shape(_FIRST + "ada_modulate_layer.proj.0.weight", 2)[0]
    inner = shape(_FIRST + "mlp.linear_fc2.weight", 2)[1]
    gated = shape(_FIRST + "mlp.linear_fc1.weight", 2)[0] == 2 * inner
    out = shape("final_linear.linear.weight", 2)[0]
    kind = ("24B" if gated else "4.5B") + ("_distill" if distilled else "_base") + ("_quant" if quantised else "")
    values = released_config(kind).to_dict()
    values["model_config"] |= {
        "num_layers": len(layers),
        "hidden_size": width,
        "ffn_hidden_size": inner,
        "num_attention_heads": queries // head,
        "num_query_groups": keys // head,
        "kv_channels": head,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": out // patch**2,
        "cond_hidden_ratio": _ratio(cond, width),
        "caption_channels": caption_channels,
        "caption_max_length": captions,
        "xattn_cond_hidden_ratio": _ratio(text, width),
        "cond_gating_ratio": _ratio(gates, 2 * width),
    }
    values["runtime_config"]["load"] = str(folder)
    return MagiConfig.from_dict(values, source=str(folder))


def _ratio(part: int, whole: int) -> float:
    """A quotient that gives `part` back when it is multiplied and cut to a whole number."""
    quotient = part / whole
    return quotient if int(whole * quotient) == part else math.nextafter(quotient, math.inf)

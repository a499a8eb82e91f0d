"""Released models as they are downloaded: recognised, inspected, made videos with; and twenty ways to be damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import run
from models.magi.folder import find_files, recognise
from models.magi.presets import find_preset, preset_of, released_config
from models.magi.weights import Checkpoint
from tests.models.downloaded import CHANNELS, SIDE, download, small_config, write_tokens
from tests.models.released import RELEASED

PROMPT = "a cat on a mat"
SMALL = ["--height", str(SIDE), "--width", str(SIDE), "--steps", "8", "--chunks", "2", "--threads", "1"]
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of MAGI-1 with all six models."""
    root = tmp_path_factory.mktemp("MAGI-1")
    for name in RELEASED:
        download(root, name)
    return root


@pytest.fixture
def model(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a distilled model in a checkout of its own, and a folder to stand in."""
    for part in ("ckpt/magi/4.5B_distill", "ckpt/vae", "ckpt/t5", "example"):
        shutil.copytree(checkout / part, tmp_path / "MAGI-1" / part)
    monkeypatch.chdir(tmp_path)
    return Path("MAGI-1", "ckpt", "magi", "4.5B_distill")


# ---- which model it is, and where its parts are


@pytest.mark.parametrize("name", RELEASED)
def test_the_kind_and_the_sizes_are_recognised(checkout: Path, name: str) -> None:
    folder = checkout / "ckpt" / "magi" / name
    found, expected = recognise(folder).to_dict(), small_config(name).to_dict()
    assert found["runtime_config"].pop("load") == str(folder)
    del expected["runtime_config"]["load"]
    assert found == expected
    inner = next(folder.iterdir())
    assert recognise(inner).engine_config == recognise(folder).engine_config  # the folder inside will do


def test_a_description_in_the_folder_is_taken_as_it_is(model: Path) -> None:
    values = small_config("4.5B_distill").to_dict()
    values["runtime_config"]["num_steps"] = 12
    (model / "config.json").write_text(json.dumps(values))
    assert recognise(model).runtime_config.num_steps == 12
    (model / "config.json").write_text('{"architectures": ["Another"]}')  # another tool's
    assert recognise(model).runtime_config.num_steps == 64


def test_the_small_model_is_recognised_too() -> None:
    pocket = find_preset("magi-pocket")
    assert preset_of(recognise(Path(pocket.config().runtime_config.load or ""))) is pocket
    assert preset_of(released_config("24B_distill")) is find_preset("magi-24b-distill")


def test_parts_are_found_beside_around_and_where_the_configuration_says(checkout: Path, model: Path) -> None:
    config = recognise(model)
    found = find_files(config, model)
    root = Path("MAGI-1").absolute()
    assert (found.vae, found.t5) == (root / "ckpt" / "vae", root / "ckpt" / "t5")
    assert found.tokens == root / "example" / "assets" / "special_tokens.npz"
    inner = find_files(config, model / "inference_weight.distill")
    assert (inner.vae, inner.t5, inner.tokens) == (found.vae, found.t5, found.tokens)
    shutil.move(root / "ckpt" / "vae", model / "vae")
    shutil.move(root / "ckpt" / "t5", Path("downloads", "t5_pretrained"))
    shutil.move(root / "example", "example")  # around where we stand
    moved = find_files(config, model)
    assert (moved.vae, moved.t5) == (model / "vae", Path("downloads", "t5_pretrained"))
    assert moved.tokens == Path("example", "assets", "special_tokens.npz").absolute()
    other = checkout / "example" / "assets" / "special_tokens.npz"
    assert find_files(config, model, tokens=other).tokens == other


# ---- videos


def frames(path: Path) -> np.ndarray:
    with av.open(path) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("name", RELEASED)
def test_a_downloaded_folder_makes_a_video_in_one_process_and_on_two_ranks(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    asked = ["generate", PROMPT, "--weights", str(checkout / "ckpt" / "magi" / name), *SMALL]
    monkeypatch.chdir(tmp_path)
    assert run([*asked, "--out", "one.mp4"]) == 0
    capfd.readouterr()
    assert run([*asked, "--pp", "2", "--out", "two.mp4"]) == 0
    one, two = frames(Path("one.mp4")), frames(Path("two.mp4"))
    assert one.shape == (48, SIDE, SIDE, 3) and np.array_equal(one, two)
    assert "100% of the steps computed (none)" in capfd.readouterr().out  # the default of released models


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_random_weights_need_no_download_and_are_the_same_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["a red circle moving right", "--weights", "random", "--steps", "4", "--chunks", "2", "--threads", "1"]
    assert run(["generate", *given, "--out", "one.mp4"]) == 0
    assert run(["generate", *given, "--pp", "2", "--out", "two.mp4"]) == 0
    assert np.array_equal(frames(Path("one.mp4")), frames(Path("two.mp4")))


def test_prompts_of_a_command_are_read_once_before_the_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import T5EncoderModel

    order, load, dit = list[str](), T5EncoderModel.from_pretrained, Checkpoint.dit

    def load_t5(folder, **how):
        order.append("T5")
        return load(folder, **how)

    def load_dit(self, *given):
        order.append("DiT")
        return dit(self, *given)

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", load_t5)
    monkeypatch.setattr(Checkpoint, "dit", load_dit)
    prompts = [PROMPT, "a bird near a lake", "a red mat"]
    kept = ["--prompt-cache", str(tmp_path / "kept")]
    assert run(["generate", *prompts, "--weights", str(model), *SMALL, *kept]) == 0
    assert order == ["T5", "DiT"] and len(list(Path("videos").glob("*.mp4"))) == 3
    assert run(["generate", *prompts, "--weights", str(model), *SMALL, *kept]) == 0
    assert order == ["T5", "DiT", "DiT"]  # what was read is on the disk


# ---- inspect


def test_inspect_says_what_it_is_and_what_it_takes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model), "--kv-budget", "2"]) == 0
    shown = capsys.readouterr().out
    assert "a MAGI-1 model of 3 layers and 32 channels, distilled" in shown
    assert "92 tensors, 42,137" in shown and "BF16 66.8 kB" in shown
    assert "with a budget of 2 chunks" in " ".join(shown.split())
    rows = [line.split() for line in shown.splitlines() if " x " in line]
    layouts = [row[:3] for row in rows]
    assert ["1", "x", "1"] in layouts and ["2", "x", "1"] in layouts and ["1", "x", "2"] in layouts
    assert "together --kv-offload host" in " ".join(shown.split())
    together, offloaded, on_host = (float(size.replace(",", "")) for size in rows[1][9::2])
    assert offloaded > 0 < on_host and together > 0


def test_inspect_names_what_is_missing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("MAGI-1/ckpt/t5")
    Path("MAGI-1/example/assets/special_tokens.npz").unlink()
    assert run(["inspect", str(model)]) == 1
    shown = capsys.readouterr().out
    assert "no T5 encoder (a folder with t5-v1_1-xxl) in" in shown and "MAGI-1/ckpt/t5" in shown
    assert "no special_tokens.npz in" in shown and "MAGI-1/example/assets" in shown


def test_verify_compares_checksums_and_reads_all_numbers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = model / "inference_weight.distill" / SHARD
    shard.with_name(SHARD + ".sha256").write_text(hashlib.sha256(shard.read_bytes()).hexdigest() + f"  {SHARD}\n")
    assert run(["inspect", str(model), "--verify"]) == 0
    assert "All 128 tensors are numbers; 1 checksums agree" in capsys.readouterr().out
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # another number, and still one
    shard.write_bytes(content)
    assert run(["inspect", str(model)]) == 0
    assert run(["inspect", str(model), "--verify"]) == 1
    assert f"{shard} is damaged: its SHA-256 is" in capsys.readouterr().out


# ---- damage


def _json(path: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        values = json.loads((root / path).read_text())
        change(values)
        (root / path).write_text(json.dumps(values))

    return damage


def _tensor(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    """Another tensor of that name in the shard that holds it; None takes it away."""

    def damage(root: Path) -> None:
        for path in sorted((root / DIT).glob("*.safetensors")):
            tensors = load_file(path)
            if name in tensors:
                del tensors[name]
                save_file(tensors | ({} if value is None else {name: value}), path)

    return damage


def _write(path: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes(content) and None  # type: ignore[return-value]


def _remove(path: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def _truncate(path: str, size: int) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / path, size)


DIT = "ckpt/magi/4.5B_distill/inference_weight.distill"
VAE, T5, TOKENS = "ckpt/vae", "ckpt/t5/t5-v1_1-xxl", "example/assets/special_tokens.npz"
INDEX = f"{DIT}/model.safetensors.index.json"
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("no weights", _remove(DIT), "holds no model: it needs a folder inference_weight"),
    ("no shard", _remove(f"{DIT}/{SHARD}"), f"{SHARD}: No such file"),
    ("a short shard", _truncate(f"{DIT}/{SHARD}", 9_000), f"{SHARD} is truncated"),
    ("no header", _truncate(f"{DIT}/{SHARD}", 6), f"{SHARD} is not a complete safetensors file"),
    ("a pointer in place of a shard", _write(f"{DIT}/{SHARD}", b"version https://git-lfs"), "is not a complete"),
    ("no JSON", _write(INDEX, b"{"), "index.json is not JSON"),
    ("no map", _json(INDEX, lambda index: index.clear()), "the object weight_map is missing"),
    ("a map to nowhere", _json(INDEX, lambda index: index["weight_map"].update({"x": "y"})), "y: No such file"),  # type: ignore[attr-defined]
    ("a key too few", _tensor("final_linear.linear.weight", None), "lacks final_linear.linear.weight"),
    ("a wrong shape", _tensor("x_embedder.weight", torch.zeros(5)), "x_embedder.weight has shape [5]"),
    ("whole numbers", _tensor("rope.bands", torch.ones(1, dtype=torch.int64)), "rope.bands is I64"),
    ("not a number", _tensor("rope.bands", torch.full((1,), torch.nan)), "rope.bands holds values that are not"),
    ("no autoencoder", _remove(VAE), "no autoencoder (a folder with config.json) in"),
    ("an empty autoencoder", _remove(f"{VAE}/diffusion_pytorch_model.safetensors"), "cannot read the weights"),
    ("another autoencoder", _json(f"{VAE}/config.json", lambda it: it.update(_class_name="V")), "_class_name is 'V'"),
    ("no T5", _remove("ckpt/t5"), "no T5 encoder (a folder with t5-v1_1-xxl) in"),
    ("a T5 without its vocabulary", _remove(f"{T5}/spiece.model"), "it lacks spiece.model"),
    ("a T5 without weights", _remove(f"{T5}/model.safetensors"), "it lacks weights"),
    ("a damaged T5", _truncate(f"{T5}/model.safetensors", 99), "cannot load the T5 encoder"),
    ("no special tokens", _remove(TOKENS), "no special_tokens.npz in"),
    ("damaged special tokens", _write(TOKENS, b"PK"), "holds no array other_tokens"),
    ("other special tokens", lambda root: write_tokens(root / TOKENS, channels=CHANNELS + 1), "other_tokens has shape"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_one_line_and_leaves_nothing(
    model: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: str
) -> None:
    damage(Path("MAGI-1"))
    assert run(["generate", PROMPT, "--weights", str(model), *SMALL]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowcache: error: ")]
    assert len(lines) == 1 and said in lines[0], lines
    assert os.listdir() == ["MAGI-1"]


@pytest.mark.parametrize(
    ("object_", "key", "value", "said"),
    [
        ("model_config", "apply_layernorm_1p", False, "apply_layernorm_1p"),
        ("model_config", "t_patch_size", 2, "t_patch_size"),
        ("runtime_config", "noise2clean_kvrange", [], "give --kv-budget CHUNKS"),
        ("runtime_config", "temporal_downsample_factor", 8, "temporal_downsample_factor"),
    ],
)
def test_what_a_description_asks_for_in_vain_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], object_: str, key: str, value: object, said: str
) -> None:
    values = small_config("4.5B_distill").to_dict()
    values[object_][key] = value
    (model / "config.json").write_text(json.dumps(values))
    assert run(["generate", PROMPT, "--weights", str(model), *SMALL]) == 2
    assert said in capsys.readouterr().err

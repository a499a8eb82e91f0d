"""MAGI-1 as the commands see it; what each method does is said in `models/family.py`."""

from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError
from models.family import Part, ReuseFigures
from models.magi import folder as folders
from models.magi import loader as loading
from models.magi import presets as known
from models.magi import weights
from models.magi.config import MagiConfig
from models.magi.random_weights import vae_config
from models.magi.sampling import MagiSampling
from models.magi.text import T5_FOLDER, SpecialTokens, check_t5
from models.magi.weights import Checkpoint, vae_parameters
from models.pocket.words import parse_prompt

# As published (FlowCache, below Eq. 8). Extrapolation was measured on magi-pocket only.
MAGI_1_FIGURES = ReuseFigures(warmup_steps=5, slow=0.01, fast=0.015, teacache=0.01, default="none", reuse="residual")
# Thresholds for 16 steps; benchmarks.quality measures what they mean.
POCKET_FIGURES = ReuseFigures(
    warmup_steps=3, slow=0.061, fast=0.0895, teacache=0.0657, default="flowcache-slow", reuse="extrapolate"
)


class MagiFamily:
    """A `Family`."""

    config_type = MagiConfig
    presets, preset_of = known.PRESETS, staticmethod(known.preset_of)
    recognise = staticmethod(folders.recognise)
    changed, loader = staticmethod(loading.changed), staticmethod(loading.loader_of)
    stage_bytes = staticmethod(weights.stage_bytes)
    notes = (
        "Weights of MAGI-1: huggingface.co/sand-ai/MAGI-1. Download the folder above, ckpt/vae and ckpt/t5, and name "
        "the first with --weights; flowcache inspect says what is missing. special_tokens.npz, of the MAGI-1 code's "
        "example/assets, is found in a checkout around it, or goes into the folder. T5 (19 GB) needs "
        "pip install 'flowcache-engine[t5]'; it is read before the model, and let go; a gang of batch holds it."
    )

    def describe(self, config: MagiConfig) -> str:
        model, engine = config.model_config, config.engine_config
        kind = ("distilled" if engine.distill else "base") + (", fp8 weights" if engine.fp8_quant else "")
        return f"a MAGI-1 model of {model.num_layers} layers and {model.hidden_size} channels, {kind}"

    def holds_model(self, folder: Path) -> bool:
        return folder.is_dir()

    def parts(self, config: MagiConfig, folder: Path, tokens: Path | None) -> Iterator[Part]:
        dit = folders.dit_folder(config, folder)
        yield Part(name="DiT", where=dit, check=lambda: Checkpoint(dit).check_dit(config))
        files = folders.find_files(config, folder, tokens=tokens)
        yield Part(name="autoencoder", where=files.vae, check=Checkpoint(files.vae).check_vae)
        if files.t5 is not None:
            t5 = files.t5 / T5_FOLDER
            yield Part(name="T5", where=t5, check=lambda: check_t5(t5))
        if (special := files.tokens) is not None:
            yield Part(name="special tokens", where=special, check=lambda: _special(special, config))

    def reuse_figures(self, config: MagiConfig) -> ReuseFigures:
        return POCKET_FIGURES if config.runtime_config.t5_pretrained is None else MAGI_1_FIGURES

    def check_prompt(self, config: MagiConfig, prompt: str) -> None:
        """As `Family`: magi-pocket has a fixed vocabulary."""
        if config.runtime_config.t5_pretrained is None:
            parse_prompt(prompt)

    def check_negative(self, config: MagiConfig) -> None:
        """As `Family`: what stands for "no text" was learned."""
        raise InputError("a negative prompt: MAGI-1 and magi-pocket read none, leave it out")

    def vae_bytes(self, config: MagiConfig, vae: Path | None) -> int:
        """As `Family`. It is fp32 beside an fp32 model."""
        described = vae_config(config) if vae is None else Checkpoint(vae).vae_config()
        return vae_parameters(described) * (4 if config.model_config.dtype.itemsize == 4 else 2)

    def sampling(
        self, config: MagiConfig, num_steps: int, *, clean_pass: bool, copy_pass: bool, given: int = 0, ends: int = 0
    ) -> MagiSampling:
        return MagiSampling(config=config, num_steps=num_steps, clean_pass=clean_pass, copy_pass=copy_pass)


def _special(path: Path, config: MagiConfig) -> str:
    SpecialTokens.from_npz(path, channels=config.model_config.caption_channels)
    return "quality and duration"

"""A two-layer model with random weights, for tests of the engine."""

import torch

from engine.request import Request
from models.attention import attention_backend
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.sampling import MagiSampling
from models.pocket.preset import pocket_config
from models.protocols import CaptionTable


def tiny_config(*, guided=False, window=4, ranges=(5, 4, 3, 2), num_steps=8):
    values = pocket_config().to_dict()
    values["model_config"] |= {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "gated_linear_unit": guided,
    }
    values["runtime_config"] |= {
        "cfg_number": 3 if guided else 1,
        "window_size": window,
        "noise2clean_kvrange": ranges,
        "num_steps": num_steps,
    }
    values["engine_config"] |= {"distill": not guided}
    return MagiConfig.from_dict(values, source="tiny")


class TinyPipeline:
    """A random model; its autoencoder cuts latents into grey frames."""

    def __init__(self, config, *, seed=0):
        self.config = config
        self.model = MagiDiT(config.model_config).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        self.attention = attention_backend("sdpa")
        self.autoencoder = self

    def see(self, image):
        return None

    def sampling(self, num_steps, *, clean_pass=True, copy_pass=True, given=0, ends=0):
        return MagiSampling(config=self.config, num_steps=num_steps, clean_pass=clean_pass, copy_pass=copy_pass)

    def captions(self, prompt):
        generator = torch.Generator().manual_seed(len(prompt))
        text = torch.randn(3, self.config.model_config.caption_channels, generator=generator)
        return CaptionTable(text=text, null=self.model.null_text()).to(self.model.device)

    def stream(self):
        return self.decode

    def decode(self, latents):
        frames, height, width = latents.shape[2] * 4, latents.shape[3] * 8, latents.shape[4] * 8
        return torch.full((frames, height, width, 3), 127, dtype=torch.uint8)

    def encode(self, frames):
        count = 1 if len(frames) == 1 else len(frames) // 4
        generator = torch.Generator().manual_seed(7)
        return torch.randn(1, 16, count, frames.shape[1] // 8, frames.shape[2] // 8, generator=generator)


def request(**changes):
    values = {"prompt": "a thing", "chunks": 4, "height": 32, "width": 48, "num_steps": 8, "seed": 3}
    return Request(**{**values, **changes})

"""A loaded model makes videos of another frame rate or negative prompt as one that was loaded for them does."""

import pytest
import torch

from engine.engine import Engine
from engine.request import Request
from tests.models.wan.small import small_pipeline

RUNTIME = {"chunk_width": 2, "stagger": 2, "window_frames": 8, "overlap_frames": 2}
REQUEST = {"prompt": "a thing", "chunks": 2, "height": 32, "width": 48, "num_steps": 4, "seed": 3}


def latents(engine, **changes):
    return torch.cat([chunk.latents for chunk in engine.generate(Request(**REQUEST, **changes))], dim=2)


@pytest.mark.parametrize("change", [{"fps": 16}, {"negative": "what nobody wants"}])
def test_a_request_may_have_a_frame_rate_and_a_negative_prompt_of_its_own(change):
    engine = Engine(small_pipeline(**RUNTIME))
    own = latents(engine)
    changed = latents(engine, **change)
    assert not torch.equal(changed, own)
    assert torch.equal(changed, latents(Engine(small_pipeline(**RUNTIME, **change))))
    assert torch.equal(latents(engine), own)

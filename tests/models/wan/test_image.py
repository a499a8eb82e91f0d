"""CLIP's vision tower, from a folder of transformers and from the released file."""

import pytest
import torch

from models.errors import InputError
from models.wan.image import RELEASED_CLIP, ClipEncoder, check_image
from tests.models.wan.downloaded import released_clip, small_clip, write_clip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    write_clip(root / "image_encoder")
    torch.save(released_clip(), root / RELEASED_CLIP)
    return root / "image_encoder", root / RELEASED_CLIP


def test_both_layouts_give_the_same_tokens(sources):
    image = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second = (ClipEncoder(source).encode(image) for source in sources)
    assert first.shape == (257, 40) and torch.equal(first, second)
    assert all(check_image(source) > 0 for source in sources)


def test_clip_gives_the_tokens_before_its_last_layer(sources):
    model, seen = small_clip(), []
    (layer,) = [module for name, module in model.named_modules() if name.endswith("encoder.layers.1")]
    layer.register_forward_hook(lambda module, given, out: seen.append(out[0] if isinstance(out, tuple) else out))
    white = ClipEncoder(sources[0]).encode(torch.full((40, 56, 3), 255, dtype=torch.uint8))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        model(((1 - mean) / std).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(white, seen[0][0], rtol=1e-4, atol=1e-4)


class _Runs:
    def __reduce__(self):
        return print, ("run",)


QKV = "visual.transformer.1.attn.to_qkv.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(QKV), "lacks visual.transformer.1.attn.k.weight, visual.transformer.1.attn.q.weight"),
        (lambda state: state.pop("visual.pos_embedding"), "holds no CLIP image encoder: it lacks visual.pos_embedding"),
        (lambda state: state.update({"visual.extra": torch.ones(2)}), "has visual.extra that the model does not"),
        (lambda state: state.update({QKV: torch.ones(3, 40)}), "has shape .1, 40."),
        (lambda state: state.update({"visual.pos_embedding": torch.ones(1, 50, 40)}), "gives 50 tokens of an image"),
        (lambda state: state["visual.post_norm.bias"].fill_(float("nan")), "post_norm.bias holds values that are not"),
        (lambda state: state.update({"step": 3}), "step is int and no tensor: it is refused"),
        (lambda state: state.update({"code": _Runs()}), "holds something else than tensors, and is refused"),
    ],
)
def test_a_damaged_file_is_one_line(sources, tmp_path, change, said):
    state = released_clip()
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match=said) as caught:
        ClipEncoder(tmp_path / "x.pth")
    assert "\n" not in str(caught.value) and "x.pth" in str(caught.value)


def test_what_is_missing_is_said(tmp_path):
    for source in (tmp_path / "absent", tmp_path / "absent.pth"):
        with pytest.raises(InputError, match="absent"):
            ClipEncoder(source)

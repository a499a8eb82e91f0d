"""UMT5 and CLIP: real ones of a few thousand parameters, in both layouts."""

import pytest
import torch

from models.errors import InputError
from models.text import KeptEncoder, TextLoading
from models.wan.text import UMT5Encoder, clean_prompt, padded, released_name
from tests.models.downloaded import write_tokenizer
from tests.models.wan.downloaded import small_umt5

PROMPT = "A  cat sits &amp;amp; looks\n at the sky"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    write_tokenizer(root / "words")
    torch.save({released_name(name): tensor for name, tensor in small_umt5().state_dict().items()}, root / "umt5.pth")
    small_umt5().save_pretrained(root / "umt5")
    return root


def test_prompts_are_repaired_unescaped_and_spaced():
    assert clean_prompt(" a &amp;lt;cat&amp;gt;\t sits\n\n here ") == "a <cat> sits here"
    assert clean_prompt("thatâ€™s Grey") == "that's Grey"


def test_both_layouts_encode_as_transformers_does_with_padding(parts):
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(parts / "words")
    padding = {"max_length": 30, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(clean_prompt(PROMPT), **padding)
    count = int(ids["attention_mask"].sum())
    with torch.no_grad():
        expected = small_umt5()(ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[0, :count]
    for weights in (parts / "umt5.pth", parts / "umt5"):
        rows = UMT5Encoder(weights, parts / "words", TextLoading(dtype="float32"), max_length=30).encode(PROMPT)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    whole = padded(rows, 30)
    assert torch.equal(whole[:count], rows) and not whole[count:].any() and whole.shape == (30, rows.shape[1])
    assert torch.equal(padded(rows, 3), rows[:3])


def test_what_was_encoded_is_read_from_the_disk(parts, tmp_path, monkeypatch):
    first, again = (UMT5Encoder(parts / "umt5.pth", parts / "words", TextLoading(cache=tmp_path)) for _ in range(2))
    kept = first.encode(PROMPT)
    monkeypatch.setattr(KeptEncoder, "_compute", None)
    assert torch.equal(again.encode("A cat sits &amp; looks at the sky"), kept)


def _without(name, state):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: _without("blocks.1.attn.o.weight", state), "lacks blocks.1.attn.o.weight"),
        (lambda state: _without("token_embedding.weight", state), "no UMT5 encoder: it lacks token_embedding"),
        (lambda state: state | {"x": torch.ones(1)}, "has x"),
        (lambda state: state | {"norm.weight": torch.ones(3)}, "norm.weight has shape"),
        (lambda state: state | {"step": 1}, "step is int and no tensor"),
    ],
)
def test_a_damaged_file_is_one_line(parts, tmp_path, change, said):
    state = torch.load(parts / "umt5.pth", weights_only=True)
    torch.save(change(state), tmp_path / "x.pth")
    with pytest.raises(InputError, match=said) as caught:
        UMT5Encoder(tmp_path / "x.pth", parts / "words").encode(PROMPT)
    assert "\n" not in str(caught.value) and "x.pth" in str(caught.value)


def test_what_is_missing_is_said_before_anything_is_read(parts, tmp_path):
    for weights, words in ((tmp_path / "x.pth", parts / "words"), (parts / "umt5.pth", tmp_path), (tmp_path, tmp_path)):
        with pytest.raises(InputError, match="UMT5"):
            UMT5Encoder(weights, words)

"""The UMT5 encoder of Wan, from a released file or a folder of `transformers`.

Prompts are cleaned as specification 1.6 says. The encoder gives the tokens that count; the model is given `text_len`
rows, of which those behind the text are zero and take part (`padded`).
"""

import html
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import TorchFile, shape_of
from models.errors import InputError
from models.rewriting import Rules
from models.text import AS_STORED, KeptEncoder, TextLoading, check_encoder, load_pretrained, package

RELEASED_TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
RELEASED_TOKENIZER = "google/umt5-xxl"
_ENCODER = "the UMT5 encoder"

released_name = Rules(
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)
"""What the released file calls a parameter of transformers' encoder."""


class UMT5Encoder(KeptEncoder):
    """UMT5-XXL (11 GB in bf16, as released), read when a prompt needs it; arguments beside these as `KeptEncoder`.

    Args:
        weights: the released file, or a folder with config.json and weights.
        tokenizer: folder of the vocabulary.

    An `InputError` if a package or a file is missing.
    """

    def __init__(
        self,
        weights: Path,
        tokenizer: Path,
        how: TextLoading = AS_STORED,
        *,
        device: str = "cpu",
        max_length: int = 512,
    ) -> None:
        super().__init__([weights, tokenizer], how, device=device, max_length=max_length)
        *_, self._transformers = (package(name, "wan") for name in ("ftfy", "sentencepiece", "transformers"))
        check_text(weights, tokenizer)
        self._weights, self._words = weights, tokenizer

    def clean(self, prompt: str) -> str:
        """As specification 1.6 says."""
        return clean_prompt(prompt)

    def load(self) -> tuple[Any, Any]:
        tokenizer = load_pretrained(self._transformers, "AutoTokenizer", self._words, _ENCODER)
        if self._weights.is_dir():
            dtype = self.dtype or "auto"
            model = load_pretrained(self._transformers, "UMT5EncoderModel", self._weights, _ENCODER, dtype=dtype)
            return tokenizer, model.to(self.device)
        files = TorchFile(self._weights)
        with torch.device("meta"):
            empty = self._transformers.UMT5EncoderModel(_released_config(self._transformers, files))
        dtypes = dict.fromkeys(empty.state_dict(), torch.float32 if self.dtype == "float32" else torch.bfloat16)
        return tokenizer, files.fill(empty, dtypes, self.device, all_used=True, stored_as=released_name)


def clean_prompt(text: str) -> str:
    """Repair what decoding has broken, undo HTML's entities, and leave one space between words. An `InputError` if ftfy
    is not installed."""
    text = html.unescape(html.unescape(package("ftfy", "wan").fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


def padded(rows: Tensor, length: int) -> Tensor:
    """Rows of a text [N, C] with zeros behind them, [length, C]; the end of a longer one falls off."""
    return F.pad(rows[:length], (0, 0, 0, max(0, length - len(rows))))


def check_text(weights: Path, tokenizer: Path) -> int:
    """See that encoder and vocabulary are there; gives the bytes of the weights, errors as in `check_encoder`."""
    if weights.is_dir():
        return check_encoder(weights, _ENCODER, tokenizer=tokenizer)
    check_encoder(tokenizer, _ENCODER, weights=False)
    try:
        return weights.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {_ENCODER} {weights}: {error.strerror}") from None


def _released_config(transformers: Any, files: TorchFile) -> Any:
    """Sizes as the shapes of a released file say; all else is UMT5-XXL's."""
    stored = files.stored()
    layers = sum(1 for name in stored if re.fullmatch(r"blocks\.\d+\.norm1\.weight", name))
    shape = partial(shape_of, stored, f"{files.source} holds no UMT5 encoder", dimensions=2)
    vocabulary, width = shape("token_embedding.weight")
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight")
    inner, hidden = (shape(f"blocks.0.{name}.weight")[0] for name in ("attn.q", "ffn.fc1"))
    return transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=hidden,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
    )

"""Captions: cleaning of prompts, the T5 encoder of MAGI-1, and its special tokens (specification 2.1 to 2.3).

A caption here is only the tokens that count; there is no padding and no mask. The text that stands for "no text" is
learned and belongs to the DiT (`MagiDiT.null_text`). The module knows no chunks: how many follow is passed in.

Shapes: N tokens, C caption channels.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import urllib.parse
import warnings
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError
from models.rewriting import Rules
from models.text import AS_STORED, KeptEncoder, TextLoading, check_encoder, load_pretrained, package

T5_FOLDER = "t5-v1_1-xxl"
"""The folder inside `t5_pretrained` that holds the encoder."""

SPECIAL_TOKENS_SHA256 = "b54bc664d5f4a722dfd8bb22201c025df61f22acddc07c0a2529d7b5cd6be5a7"
"""Digest of the released `special_tokens.npz`."""

_ENCODER = "the T5 encoder"
_RELEASED_CHANNELS = 4096  # of T5 v1.1 XXL

_TOKEN_ROWS = 100
SpecialToken = Literal["HQ", "DURATION", "STATIC", "DYNAMIC", "BORDERNESS", "3D", "2D"]
SPECIAL: tuple[SpecialToken, ...] = ("HQ", "DURATION")  # as the released run.sh has it
_ROWS = {"HQ": 1, "STATIC": 2, "DYNAMIC": 3, "BORDERNESS": 4, "DURATION": 7, "3D": 15, "2D": 16}
_TRANS = 0
_DURATIONS = 8  # rows from that of DURATION on: the last chunk's, then those of the chunks before it
# The released code puts one after the other in front of the text, in the opposite order (2.3).
_FRONT: tuple[SpecialToken, ...] = ("DURATION", "2D", "3D", "HQ", "BORDERNESS", "DYNAMIC", "STATIC")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Learned vectors that say what kind of video is wanted (2.3), in fp32."""

    other: Tensor  # [100, C], by row
    caption: Tensor  # [1, C]
    logo: Tensor  # [1, C]

    @classmethod
    def from_npz(cls, path: Path, *, channels: int) -> SpecialTokens:
        """Read `special_tokens.npz`. With the channels of released models it must be the released file. An `InputError`
        if it is another file, cannot be read, or lacks the vectors."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the special tokens {path}: {error.strerror}") from None
        digest = hashlib.sha256(content).hexdigest()
        if channels == _RELEASED_CHANNELS and digest != SPECIAL_TOKENS_SHA256:
            raise InputError(
                f"{path} is not the released special_tokens.npz: its SHA-256 is {digest}, not {SPECIAL_TOKENS_SHA256}"
            )
        found = {}
        for name, rows in {"other_tokens": _TOKEN_ROWS, "caption_token": 1, "logo_token": 1}.items():
            try:
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    values = arrays[name]
            except (KeyError, ValueError, zipfile.BadZipFile) as error:
                raise InputError(f"{path} holds no array {name}: {error}") from None
            if values.shape != (rows, channels):
                raise InputError(f"{path}: {name} has shape {list(values.shape)}, expected [{rows}, {channels}]")
            if values.dtype.kind != "f":
                raise InputError(f"{path}: {name} holds {values.dtype} and not floating-point numbers")
            # Through fp16, as released: the vectors that the DiT was trained with were rounded to it.
            found[name] = torch.from_numpy(values.astype(np.float16).astype(np.float32))
        return cls(other=found["other_tokens"], caption=found["caption_token"], logo=found["logo_token"])

    def counter_rows(self, names: Collection[SpecialToken]) -> Tensor | None:
        """Rows in front of the text: what is wanted, and with `DURATION` how much of the video is left; [8, P, C], by
        how many chunks come after the chunk, of which more than 7 count as 7. None without names."""
        chosen = [name for name in _FRONT if name in names]
        if not chosen:
            return None
        rows = [[_ROWS[name] + (left if name == "DURATION" else 0) for name in chosen] for left in range(_DURATIONS)]
        return torch.stack([self.other[row] for row in rows])

    def negative(self, null: Tensor) -> Tensor:
        """The text of "no text" [M, C] with what is not wanted in front, as the released NEG_PROMPT has it (2.4)."""
        unwanted = [self.other[_ROWS["BORDERNESS"]][None], self.other[_TRANS][None], self.logo, self.caption]
        return torch.cat([row.to(null) for row in unwanted] + [null])[: len(null)]


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Loading(TextLoading):
    """How prompts are read with T5."""

    tokens: Path | None = None  # special_tokens.npz; None searches it, as `find_files` does
    special: tuple[SpecialToken, ...] = SPECIAL  # what kind of video is wanted
    negative: bool = False  # what is not wanted stands in front of the text of "no text"


class T5Encoder(KeptEncoder):
    """The T5 v1.1 XXL encoder (19 GB in fp32, as released), read when a prompt needs it.

    The released code pads every prompt to `max_length` tokens and masks the padding. Masked positions weigh exactly
    zero, so nothing is padded here: the same result up to the order of summation, and a short prompt is far cheaper.

    `folder` is `t5_pretrained`, which holds `t5-v1_1-xxl`; the other arguments are as in `KeptEncoder`. An `InputError`
    says that the folder or a package is missing.
    """

    def __init__(
        self, folder: Path, how: TextLoading = AS_STORED, *, device: str = "cpu", max_length: int = 800
    ) -> None:
        self.folder = folder / T5_FOLDER
        super().__init__([self.folder], how, device=device, max_length=max_length)
        # Without the first two the released `spiece.model` cannot be read.
        names = ("sentencepiece", "google.protobuf", "transformers")
        *_, self._transformers = (package(name, "t5") for name in names)
        if not self.folder.is_dir():
            raise InputError(f"no T5 encoder at {self.folder}: t5_pretrained must hold the folder {T5_FOLDER}")
        check_t5(self.folder)

    def clean(self, prompt: str) -> str:
        """As specification 2.2 says."""
        return clean_prompt(prompt)

    def load(self) -> tuple[Any, Any]:
        tokenizer = load_pretrained(self._transformers, "AutoTokenizer", self.folder, _ENCODER)
        model = load_pretrained(self._transformers, "T5EncoderModel", self.folder, _ENCODER, dtype=self.dtype or "auto")
        return tokenizer, model.to(self.device)


def check_t5(folder: Path) -> int:
    """See that a folder holds what T5 is read from; gives the bytes of its weights, errors as in `check_encoder`."""
    return check_encoder(folder, _ENCODER)


# Cleaning of prompts: patterns and their replacements, in order.
_ADDRESS = (
    r"\b((?:{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)))"
)
_DASHES = (
    r"\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    r"\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# Specification 2.2, step 3.
_ADDRESSES = Rules((_ADDRESS.format(scheme="https?"), ""), (_ADDRESS.format(scheme="www"), ""))

# Steps 5 to 17: marks, dashes, quotes and what a web page leaves behind.
_MARKS = Rules(
    (r"@[\w\d]+\b", ""),
    (r"[\u31c0-\u9fff]+", ""),  # seven blocks in a row
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE_ENDINGS})", ""),
    (r"[\"']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

# Step 18.
_JOINER = re.compile(r"[-_]")
_MOST_JOINERS = 3

# Steps 20 to 27: codes, advertisements, sizes, spaces around punctuation, and a quote around all.
_WORDS = Rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_ENDINGS})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # Latin x, Cyrillic ha, times
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['\_,\-\:;]", ""),
    (r"['\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_prompt(text: str) -> str:
    """Clean a prompt as the captions that MAGI-1 was trained on were cleaned (specification 2.2).

    The rules were made for captions scraped from the web. They also lower the case and delete all Chinese characters,
    and a prompt must be treated alike. They are applied twice, as in the released code: the second pass still changes
    some.

    An `InputError` if ftfy or beautifulsoup4 is not installed.
    """
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _ADDRESSES(text.replace("<person>", "person"))
    text = _MARKS(_without_tags(text))
    if len(_JOINER.findall(text)) > _MOST_JOINERS:
        text = _JOINER.sub(" ", text)
    text = package("ftfy", "t5").fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return _WORDS(text).strip()


def _without_tags(text: str) -> str:
    soup = package("bs4", "t5").BeautifulSoup
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that a short prompt looks like a file name
        return str(soup(text, features="html.parser").text)

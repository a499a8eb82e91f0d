"""Cleaning of prompts, as the captions that MAGI-1 was trained on were cleaned (specification 2.2).

The rules were made for captions scraped from the web. They also lower the case and delete all Chinese characters, and
a prompt must be treated alike. The module knows strings only.
"""

from __future__ import annotations

import html
import importlib
import re
import urllib.parse
import warnings
from collections.abc import Iterable
from types import ModuleType

from models.errors import InputError

_Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_ADDRESS = (
    r"\b((?:{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)))"
)
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
    "\uff0d"
)
_FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# Specification 2.2, step 3.
_ADDRESSES = _rules((_ADDRESS.format(scheme="https?"), ""), (_ADDRESS.format(scheme="www"), ""))

# Steps 5 to 17: marks, dashes, quotes and what a web page leaves behind.
_MARKS = _rules(
    (r"@[\w\d]+\b", ""),
    (r"[\u31c0-\u31ef]+", ""),
    (r"[\u31f0-\u31ff]+", ""),
    (r"[\u3200-\u32ff]+", ""),
    (r"[\u3300-\u33ff]+", ""),
    (r"[\u3400-\u4dbf]+", ""),
    (r"[\u4dc0-\u4dff]+", ""),
    (r"[\u4e00-\u9fff]+", ""),
    (rf"[{re.escape(_DASHES[0])}{_DASHES[1:]}]+", "-"),
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
_WORDS = _rules(
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
    """Clean a prompt. The procedure is applied twice, as in the released code: the second pass still changes some.

    Raises:
        InputError: ftfy or beautifulsoup4 is not installed.
    """
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _apply(_ADDRESSES, text.replace("<person>", "person"))
    text = _apply(_MARKS, _without_tags(text))
    if len(_JOINER.findall(text)) > _MOST_JOINERS:
        text = _JOINER.sub(" ", text)
    text = _package("ftfy").fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return _apply(_WORDS, text).strip()


def _without_tags(text: str) -> str:
    soup = _package("bs4").BeautifulSoup
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that a short prompt looks like a file name
        return str(soup(text, features="html.parser").text)


def _apply(rules: Iterable[_Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"cleaning a prompt needs the Python package {name}: pip install 'flowcache-engine[t5]'"
        ) from None

"""Prompt cleaning, a real T5 of a few thousand parameters made on the spot, and special tokens."""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from models.errors import InputError
from models.magi.text import SPECIAL, SpecialToken, SpecialTokens, T5Encoder, clean_prompt
from models.protocols import CaptionTable
from models.text import TextLoading
from tests.models.downloaded import write_t5, write_tokens

CHANNELS = 16
CORPUS = """a cat sits on a red mat
good morning, says the tall woman with a black hat
two dogs run along the beach at sunset
slow motion, wide angle, a boat on the calm sea
the camera follows a small bird through the old forest
"""


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        pytest.param("  A+Big%20Cat ", "a big cat", id="1 url-unquote, strip, lower"),
        pytest.param("a <person> walks", "a person walks", id="2 person"),
        pytest.param("see https://cats.org/all-cats of a cat", "see of a cat", id="3 address with a scheme"),
        pytest.param("see https://some.site/page", "see some. site page", id="3 a scheme alone, of unknown endings"),
        pytest.param("see www.cats.com/all of a cat", "see of a cat", id="3 bare address"),
        pytest.param("see www:cats", "see ats", id="3 www and a colon"),
        pytest.param("a <b>bold</b> cat", "a bold cat", id="4 tags"),
        pytest.param("a cat by @someone here", "a cat by here", id="5 handles"),
        pytest.param("a cat 一只猫 \u31c5\u31f1㈱㍍㐂䷀ runs", "a cat runs", id="6 Chinese characters"),
        pytest.param("black\u2014\u2013white", "black-white", id="7 dashes"),
        pytest.param("she said «hi» today", 'she said "hi" today', id="8 double quotes"),
        pytest.param("the cat‘s hat", "the cat's hat", id="8 single quotes"),
        pytest.param("salt &amp;amp pepper", "salt pepper", id="9 leftover entity"),
        pytest.param("salt &amp;quot;pepper", "salt pepper", id="9 leftover quote"),
        pytest.param("from 192.168.1.10 came a cat", "from came a cat", id="10 network addresses"),
        pytest.param("a cat 1:23 @someone", "a cat", id="11 a time at the end"),
        pytest.param("a cat at 1:23", "a cat at 1:23", id="11 no space after it"),
        pytest.param(r"a cat\n runs", "a cat runs", id="12 literal newline"),
        pytest.param("cat #12 of 1234567 #12345", "cat of", id="13 numbers"),
        pytest.param("a cat in photo.jpeg now", "a cat in now", id="14 file names"),
        pytest.param("he said ''' yes", 'he said " yes', id="15 runs of quotes"),
        pytest.param("a cat... runs", "a cat runs", id="15 runs of dots"),
        pytest.param("a cat*~(white)/[black]\\{x}|y", "a cat white black x y", id="16 marks"),
        pytest.param("a cat . it runs", "a cat it runs", id="17 lonely dots"),
        pytest.param("a-b_c-d stays", "a-b_c-d stays", id="18 three joiners"),
        pytest.param("a-b_c-d_e goes", "a b c d e goes", id="18 four joiners"),
        pytest.param("a ﬁsh and a ｄｏｇ", "a fish and a dog", id="19 ligatures and wide letters"),
        pytest.param("cat ab123 dsc00123 x12y 1ab2 end", "cat end", id="20 codes"),
        pytest.param("worldwide free shipping of a cat", "of a cat", id="21 shipping"),
        pytest.param("free download a cat", "a cat", id="21 download"),
        pytest.param("click on this a cat", "a cat", id="21 click"),
        pytest.param("a png image of a cat", "a of a cat", id="21 file kinds"),
        pytest.param("a cat page 12 sleeps", "a cat sleeps", id="21 pages"),
        pytest.param("a cat 1a2b3c sleeps", "a cat sleeps", id="22 mixed codes"),
        pytest.param("a 1920x1080 cat, 3.5×4 wide", "a cat, wide", id="23 sizes"),
        pytest.param("a cat : a dog", "a cat: a dog", id="24 space before a colon"),
        pytest.param("red,green cat.sleeps", "red, green cat. sleeps", id="25 space after punctuation"),
        pytest.param("a \t cat \n\n runs", "a cat runs", id="26 spaces"),
        pytest.param('"a quoted cat"', "a quoted cat", id="27 quote around all"),
        pytest.param("-a cat", "a cat", id="27 leading mark"),
        pytest.param("a cat_", "a cat", id="27 trailing mark"),
        pytest.param(".hidden", "", id="27 a dot and a word"),
        pytest.param("", "", id="empty"),
    ],
)
def test_cleaning_rule(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned


def test_cleaning_runs_twice() -> None:
    """One pass leaves `a%20cat` of a doubly quoted prompt."""
    assert clean_prompt("a%2520cat") == "a cat"


def test_an_ordinary_prompt_is_only_lowered() -> None:
    prompt = "Good Morning! A woman, 30 years old, waves (slowly) at the well-known camera."
    assert clean_prompt(prompt) == "good morning! a woman, 30 years old, waves slowly at the well-known camera."


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("t5")
    write_t5(root, channels=CHANNELS, corpus=CORPUS)
    return root


def test_t5_gives_the_rows_that_count_of_a_padded_encoding(t5_folder: Path) -> None:
    from transformers import T5EncoderModel, T5Tokenizer

    prompt = "A cat sits on a Red mat"
    encoder = T5Encoder(t5_folder, max_length=40)
    rows = encoder.encode(prompt)
    tokenizer = T5Tokenizer.from_pretrained(t5_folder / "t5-v1_1-xxl")
    model = T5EncoderModel.from_pretrained(t5_folder / "t5-v1_1-xxl").eval()
    padded = tokenizer(prompt.lower(), max_length=40, padding="max_length", truncation=True, return_tensors="pt")
    count = int(padded["attention_mask"].sum())
    assert 1 < count < 40
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(t5_folder / "t5-v1_1-xxl" / "spiece.model"))
    assert padded["input_ids"][0, :count].tolist() == [*pieces.encode(prompt.lower()), pieces.eos_id()]
    with torch.no_grad():
        expected = model(padded["input_ids"], attention_mask=padded["attention_mask"]).last_hidden_state[0, :count]
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def test_t5_cleans_the_prompt(t5_folder: Path) -> None:
    encoder = T5Encoder(t5_folder)
    clean = encoder.encode("a cat on a mat")
    assert torch.equal(encoder.encode("A <b>cat</b> on a mat @nobody"), clean)
    assert not torch.equal(encoder.encode("a dog on a mat")[-1], clean[-1])


def test_t5_cuts_a_long_prompt(t5_folder: Path) -> None:
    encoder = T5Encoder(t5_folder, max_length=6)
    assert encoder.encode(CORPUS).shape == (6, CHANNELS)


def test_t5_can_be_released_and_used_again(t5_folder: Path) -> None:
    encoder = T5Encoder(t5_folder)
    before = encoder.encode("a cat")
    encoder.release()
    assert torch.equal(encoder.encode("a cat"), before)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows by one entry with each load of a T5; the model that is loaded is the real one."""
    from transformers import T5EncoderModel

    loads, load = list[object](), T5EncoderModel.from_pretrained

    def counting(folder, **how):
        loads.append(folder)
        return load(folder, **how)

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", counting)
    return loads


def test_several_prompts_load_t5_once_and_known_ones_not_at_all(
    t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, kept = counted(monkeypatch), TextLoading(cache=tmp_path / "prompts")
    encoder = T5Encoder(t5_folder, kept)
    cat, dog = encoder.encode("a cat"), encoder.encode("a dog")
    assert len(loads) == 1
    encoder.release()
    assert encoder.encode("A  CAT") is cat and len(loads) == 1  # the same once it is cleaned
    again = T5Encoder(t5_folder, kept)
    assert torch.equal(again.encode("a dog"), dog) and len(loads) == 1  # from the disk
    other = T5Encoder(t5_folder, replace(kept, dtype="bfloat16"), max_length=2)
    assert other.encode("a dog").shape == (2, CHANNELS) and len(loads) == 2  # what it depends on counts
    for path in (tmp_path / "prompts").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(T5Encoder(t5_folder, kept).encode("a dog"), dog) and len(loads) == 3
    full = T5Encoder(t5_folder, TextLoading(cache=Path("/dev/null/prompts")))  # where nothing can be kept
    assert torch.equal(full.encode("a dog"), dog)


def test_bf16_is_an_option_and_what_the_files_have_the_default(t5_folder: Path, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    ways = TextLoading(dtype="float32"), TextLoading(dtype="bfloat16")
    exact, rounded = (T5Encoder(t5_folder, how).encode("a cat") for how in ways)
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(T5Encoder(t5_folder).encode("a cat"), exact)
    shutil.copytree(t5_folder / "t5-v1_1-xxl", tmp_path / "t5-v1_1-xxl")
    T5EncoderModel.from_pretrained(t5_folder / "t5-v1_1-xxl").bfloat16().save_pretrained(tmp_path / "t5-v1_1-xxl")
    assert torch.equal(T5Encoder(tmp_path).encode("a cat"), rounded)


def test_an_empty_prompt_still_has_its_end_token(t5_folder: Path) -> None:
    assert T5Encoder(t5_folder).encode("").shape == (1, CHANNELS)


def test_a_missing_or_damaged_t5_is_reported(t5_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="t5_pretrained must hold the folder t5-v1_1-xxl"):
        T5Encoder(tmp_path)
    (tmp_path / "t5-v1_1-xxl").mkdir()
    with pytest.raises(InputError, match="cannot load the T5 encoder from .*t5-v1_1-xxl") as caught:
        T5Encoder(tmp_path).encode("a cat")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["transformers", "sentencepiece", "google.protobuf"])
def test_a_missing_package_is_named(package: str, t5_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"needs the Python package {package}: pip install"):
        T5Encoder(t5_folder)


@pytest.mark.parametrize("package", ["ftfy", "bs4"])
def test_cleaning_names_a_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"needs the Python package {package}: pip install"):
        clean_prompt("a cat")


def test_special_tokens_are_rounded_to_fp16(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens.npz", channels=CHANNELS)
    other = np.load(tmp_path / "tokens.npz")["other_tokens"]
    tokens = SpecialTokens.from_npz(tmp_path / "tokens.npz", channels=CHANNELS).other
    assert tokens.dtype == torch.float32
    assert np.array_equal(tokens.numpy(), other.astype(np.float16).astype(np.float32))
    assert not np.array_equal(tokens.numpy(), other.astype(np.float32))


def test_other_special_tokens_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"

    def message(channels: int = CHANNELS) -> str:
        with pytest.raises(InputError) as caught:
            SpecialTokens.from_npz(path, channels=channels)
        return str(caught.value)

    assert message().startswith(f"cannot read the special tokens {path}")
    write_tokens(path, channels=7)
    assert "other_tokens has shape [100, 7], expected [100, 16]" in message()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"its SHA-256 is {digest}, not b54bc664" in message(channels=4096)  # of the released models
    np.savez(path, other_tokens=np.ones((100, CHANNELS), dtype=int))
    assert "int64 and not floating-point" in message()
    np.savez(path, tokens=np.ones(3))
    assert "holds no array other_tokens" in message()
    path.write_text("no archive")
    assert "holds no array other_tokens" in message()


def numbers(*rows: float) -> torch.Tensor:
    return torch.tensor(rows)[:, None].expand(len(rows), CHANNELS)


def special_tokens() -> SpecialTokens:
    """Row r of the tokens holds r, those of captions and logos hold 200 and 300."""
    return SpecialTokens(other=numbers(*map(float, range(100))), caption=numbers(200.0), logo=numbers(300.0))


def numbered(max_length: int = 800, names: tuple[SpecialToken, ...] = SPECIAL) -> CaptionTable:
    """Text rows hold -1, -2, -3, row r of the special tokens holds r, the null text -9."""
    text = -torch.arange(1.0, 4.0)[:, None].expand(3, CHANNELS)
    null = torch.full((2, CHANNELS), -9.0)
    return CaptionTable(text=text, null=null, counters=special_tokens().counter_rows(names), max_length=max_length)


def test_special_tokens_come_first_duration_before_quality() -> None:
    assert numbered().get("text", 0, 2).text[:, 0].tolist() == [9, 1, -1, -2, -3]
    assert numbered().get("null", 0, 2).text[:, 0].tolist() == [-9, -9]


@pytest.mark.parametrize(("chunks_left", "row"), [(0, 7), (1, 8), (6, 13), (7, 14), (8, 14), (500, 14)])
def test_the_duration_token_counts_chunks_down(chunks_left: int, row: int) -> None:
    assert numbered().get("text", 0, chunks_left).text[0, 0] == row


def test_the_end_of_a_long_text_falls_off() -> None:
    assert numbered(4).get("text", 0, 0).text[:, 0].tolist() == [7, 1, -1, -2]


def test_every_special_token_has_its_row_in_the_published_order() -> None:
    names: tuple[SpecialToken, ...] = ("HQ", "STATIC", "DYNAMIC", "BORDERNESS", "3D", "2D", "DURATION")
    assert numbered(names=names).get("text", 0, 3).text[:, 0].tolist() == [10, 16, 15, 1, 4, 3, 2, -1, -2, -3]
    assert numbered(names=("3D",)).get("text", 0, 3).text[:, 0].tolist() == [15, -1, -2, -3]
    assert numbered(names=()).get("text", 0, 3).text[:, 0].tolist() == [-1, -2, -3]


def test_what_is_not_wanted_stands_in_front_of_no_text_and_pushes_its_end_out() -> None:
    null = special_tokens().negative(numbers(*map(float, range(-1, -51, -1))))
    assert null[:, 0].tolist() == [4, 0, 300, 200, *range(-1, -47, -1)]


def test_a_later_text_takes_the_place_of_the_first_from_its_chunk_on() -> None:
    table = replace(numbered(names=()), later=((3, numbers(50.0)), (5, numbers(60.0, 61.0))))
    seen = [table.get("text", chunk, 0).text[:, 0].tolist() for chunk in range(7)]
    assert seen == [[-1, -2, -3]] * 3 + [[50]] * 2 + [[60, 61]] * 2
    assert table.get("null", 6, 0).text[:, 0].tolist() == [-9, -9]
    counted = replace(numbered(), later=((3, numbers(50.0)),))
    assert counted.get("text", 3, 2).text[:, 0].tolist() == [9, 1, 50]

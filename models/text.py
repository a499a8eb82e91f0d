"""Text encoders of `transformers`, and what they have encoded: kept in memory, and on the disk for the next run.

A caption here is only the tokens that count; there is no padding and no mask. Which encoder, and how a prompt is
cleaned, is a family's business.

Shapes: N tokens, C caption channels.
"""

import hashlib
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import InputError

_KNOWN, _KEPT = 256, 1000  # encoded prompts in memory and on the disk, of 13 MB at most

TextDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLoading:
    """How prompts are read."""

    device: str | None = None  # where they are encoded; None is what the family says, on the CPU if there is no GPU
    dtype: TextDtype | None = None  # of the encoder; None is as its files have it
    cache: Path | None = None  # folder where encoded prompts are kept; None keeps none
    prompts: tuple[str, ...] = ()  # known before the model is loaded: the encoder reads them first, and is let go


AS_STORED = TextLoading()


class TextEncoder(Protocol):
    """What turns a prompt into a caption."""

    def encode(self, prompt: str) -> Tensor:
        """Encode one prompt: [N, C] fp32; an `InputError` if it cannot be."""


class KeptEncoder(ABC):
    """An encoder that is read when a prompt needs it, and keeps what it has encoded. May be called by several threads.

    Args:
        files: what the result depends on: files, and folders of files.
        how: device, dtype of the weights, and the folder where results are kept, by what they depend on.
        device: where to encode if nothing else is said, and there is a GPU.
        max_length: most tokens of a caption; longer prompts are cut.
    """

    def __init__(self, files: Sequence[Path], how: TextLoading, *, device: str, max_length: int) -> None:
        self.files, self.dtype, self.max_length = files, how.dtype, max_length
        self.device = how.device or (device if torch.cuda.is_available() else "cpu")
        self._cache, self._known, self._lock = how.cache, dict[str, Tensor](), Lock()
        self._tokenizer: Any = None
        self._model: Any = None

    @abstractmethod
    def clean(self, prompt: str) -> str:
        """A prompt as the model was trained to read it."""

    @abstractmethod
    def load(self) -> tuple[Any, Any]:
        """Tokenizer and model, in evaluation mode; an `InputError` if the files cannot be used."""

    def encode(self, prompt: str) -> Tensor:
        """Clean a prompt and encode it: [N, C] fp32. An `InputError` if the files cannot be used."""
        text = self.clean(prompt)
        with self._lock:
            if text not in self._known:
                kept = None if self._cache is None else self._cache / f"{self._key(text)}.safetensors"
                rows = None if kept is None else _read_rows(kept)
                if rows is None:
                    rows = self._compute(text)
                    if kept is not None:
                        _keep_rows(kept, rows)
                if len(self._known) >= _KNOWN:
                    self._known.pop(next(iter(self._known)))
                self._known[text] = rows
            return self._known[text]

    def read_ahead(self, prompts: Iterable[str]) -> None:
        """Encode prompts that are known, and free the weights; errors as in `encode`."""
        for prompt in prompts:
            self.encode(prompt)
        self.release()

    def release(self) -> None:
        """Free the weights. What was encoded stays; another prompt reads them again."""
        with self._lock:
            self._tokenizer = self._model = None
            if torch.device(self.device).type == "cuda":
                torch.cuda.empty_cache()

    def _key(self, text: str) -> str:
        """Names an encoded prompt by all that it depends on."""
        paths = [path for given in self.files for path in (sorted(given.iterdir()) if given.is_dir() else [given])]
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        kind = torch.device(self.device).type
        return hashlib.sha256(repr((1, files, kind, self.dtype, self.max_length, text)).encode()).hexdigest()

    def _compute(self, text: str) -> Tensor:
        if self._model is None:
            self._tokenizer, self._model = self.load()
        ids = self._tokenizer(text, max_length=self.max_length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            rows = self._model(ids["input_ids"].to(self.device)).last_hidden_state[0]
        return rows.float().cpu()


def _read_rows(path: Path) -> Tensor | None:
    """An encoded prompt that was kept; None if it is not there, or damaged."""
    try:
        rows = load_file(path)["text"]
    except (OSError, SafetensorError, KeyError):
        return None
    return rows if rows.ndim == 2 and rows.dtype == torch.float32 and rows.isfinite().all() else None


def _keep_rows(path: Path, rows: Tensor) -> None:
    """Keep an encoded prompt for the next run, and no more than the newest; where that is impossible, do without."""
    own = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"text": rows.contiguous()}, own)
        own.replace(path)
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda one: one.stat().st_mtime)[:-_KEPT]:
            old.unlink()
    except (OSError, SafetensorError):
        with suppress(OSError):
            own.unlink()


def package(name: str, extra: str, what: str = "a prompt") -> ModuleType:
    """A package of an extra; an `InputError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{what} needs the Python package {error.name or name}: pip install 'flowcache-engine[{extra}]'"
        ) from None


def load_pretrained(transformers: Any, kind: str, folder: Path, what: str, **options: Any) -> Any:
    """A model or a tokenizer of `transformers` from a folder, by the name of its class. An `InputError` if it cannot be
    read, or weights are missing, which would be random numbers."""
    transformers.utils.logging.disable_progress_bar()  # this command shows its own
    is_model = not kind.endswith(("Tokenizer", "Processor"))
    try:
        if not is_model:
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, **options)
        model, info = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load {what} from {folder}: {reason}") from None
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"cannot load {what} from {folder}: it lacks {missing[0]}{more}")
    return model.requires_grad_(False).eval()


def check_encoder(
    folder: Path, what: str, *, tokenizer: Path | None = None, weights: bool = True, words: bool = True
) -> int:
    """See that folders hold what an encoder is read from: description, vocabulary and weights, whose bytes it gives. An
    `InputError` if something is missing. The library would make up a vocabulary, and say nothing."""
    place = tokenizer or folder
    known = (place / "spiece.model").is_file() or (place / "tokenizer.json").is_file()
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    for name, where, held in (
        ("config.json", folder, (folder / "config.json").is_file() or not weights),
        ("spiece.model", place, known or not words),
        ("weights (*.safetensors or pytorch_model*.bin)", folder, files or not weights),
    ):
        if not held:
            raise InputError(f"cannot load {what} from {where}: it lacks {name}")
    return sum(path.stat().st_size for path in files)

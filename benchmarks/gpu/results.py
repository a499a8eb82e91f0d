"""What was measured, a file for each part, each of one code, preset and device."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.common import ROOT, Row, save_text
from benchmarks.gpu.bench import Bench
from models.errors import InputError

_CODE = ("models", "engine", "parallel", "launch", "benchmarks")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What came of a part."""

    rows: list[Row]
    seconds: float
    complete: bool  # it was measured to its end
    error: str = ""  # what it failed of


@dataclass(frozen=True)
class Results:
    """The results of one run in a folder, which may have been interrupted; an `InputError` for those of another run."""

    folder: Path
    bench: Bench

    @cached_property
    def key(self) -> dict[str, str]:
        """What all parts must have in common."""
        code = hashlib.blake2b(digest_size=6)
        for path in sorted(path for name in _CODE for path in (ROOT / name).rglob("*.py")):
            code.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
        device = torch.cuda.get_device_name(0) if self.bench.cuda else "CPU"
        return {"code": code.hexdigest(), "preset": self.bench.preset, "device": device, "torch": torch.__version__}

    def read(self, name: str) -> Result | None:
        """What is there of a part."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text())
            key, result = values.pop("of"), Result(**values)
        except (OSError, ValueError, TypeError, AttributeError, LookupError):
            raise InputError(f"{path} is no result of this benchmark: give another folder with --out") from None
        if key != self.key:
            found, here = (", ".join(f"{name} {one[name]}" for name in self.key) for one in (key, self.key))
            raise InputError(f"{path} is of {found}; this is {here}: give another folder with --out")
        return result

    def write(self, name: str, result: Result) -> None:
        """Keep what there is of a part."""
        save_text(self._path(name), json.dumps({"of": self.key, **asdict(result)}, indent=1))

    def rows(self, name: str) -> Sequence[Row]:
        """Rows of a part; none if it was not measured."""
        result = self.read(name)
        return result.rows if result else ()

    def peak(self) -> float | None:
        """The most operations a second of a product in the model's dtype, in TFLOP/s, if that was measured."""
        dtype = str(self.bench.shapes.dtype).removeprefix("torch.")
        return next((float(row["TFLOP/s"] or 0) for row in self.rows("peaks") if dtype in str(row["what"])), None)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

"""How much of the past a request holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.kv.selection import SelectionSettings
from models.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSettings:
    """Memory policy of the finished chunks."""

    budget: int | None = None
    """B_budget in chunks: everything is attended to, and compressed to that size as chunks retire. None holds what the
    model's own range asks for."""
    selection: SelectionSettings = field(default_factory=SelectionSettings)  # how tokens are scored and kept

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise InputError(f"a KV budget of {self.budget} chunks keeps nothing: give 1 or more")

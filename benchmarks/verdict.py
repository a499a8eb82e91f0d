"""What a benchmark holds itself to: one line each, with PASS or FAIL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import markdown_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One line: what was measured, what is wanted, and whether it is so."""

    name: str
    measured: str
    wanted: str
    passed: bool


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """All verdicts as a Markdown table."""
    rows = [(one.name, one.measured, one.wanted, "PASS" if one.passed else "FAIL") for one in verdicts]
    return markdown_table(("figure", "measured", "wanted", "verdict"), rows)

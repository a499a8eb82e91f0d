"""Texts rewritten by patterns and their replacements, one after the other: names of tensors, and prompts."""

import re


class Rules:
    """Pairs of a regular expression and what takes its place, in order."""

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self._rules = tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)

    def __call__(self, text: str) -> str:
        """The text after all of them."""
        for pattern, replacement in self._rules:
            text = pattern.sub(replacement, text)
        return text

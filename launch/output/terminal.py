"""What displays share: plain lines, clocks, and text that cannot move a cursor."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a line as it is: neither wrapped nor read as markup."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Seconds as 0:00 or 0:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str) -> str:
    """A text on one line, and without what would move the cursor."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())

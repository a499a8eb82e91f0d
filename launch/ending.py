"""How a command ends that was not ended by its own input: with a status, and with a line that is shown once."""

from __future__ import annotations

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "Ended"]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # 128 + SIGINT, as shells count


class Ended(Exception):  # noqa: N818 - it may be an interrupt
    """The ranks have ended.

    Args:
        text: one line.
        status: exit status.
        shown_here: this process is the one that shows the line.
    """

    def __init__(self, text: str, *, status: int, shown_here: bool) -> None:
        super().__init__(text)
        self.status, self.shown_here = status, shown_here

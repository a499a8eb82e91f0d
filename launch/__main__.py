"""`python -m launch` and the command `flowcache`. Until everything is imported, Ctrl-C ends the process at once.

Imports take a while, and an interrupt within one would be shown as a traceback, or swallowed. There is nothing to clean
up yet. So this file imports next to nothing; what is left is the start of the interpreter itself.
"""

from __future__ import annotations

import os
import signal


def _end_at_once(number: int, frame: object) -> None:
    os._exit(128 + number)


def main() -> None:
    """Run the command line of this process and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    from launch.cli import main as run

    run()


if __name__ == "__main__":
    main()

"""Waiting for what other threads and processes do."""

import time


def until(condition, what="it has not come to that", seconds=20.0, pause=0.01):
    """What a condition gives as soon as that is true; an error says `what`, a text or what gives one, if it is late."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(pause)
    return found

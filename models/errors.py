"""The one error that a person's own input can cause.

It does not know how it is shown: the command line prints its message as one line and exits with status 2.
"""


class InputError(ValueError):
    """Something that was given cannot be used. The message says what, where, and what to do, in one line."""

"""The two kinds of failure a user can mend; anything else is a bug and keeps its traceback."""

from __future__ import annotations


class UsageError(Exception):
    """The job cannot start or go on; the message is one line that names the cause and the remedy."""


class InputError(Exception):
    """One input file cannot be used; the rest of the job goes on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

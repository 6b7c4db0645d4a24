"""The one error that a user can cause: its message is a sentence saying what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class CatsError(Exception):
    """A wrong input or a missing prerequisite; the command line prints the message and exits with 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The text " (did you mean X?)" with the nearest of `known`; nothing where none is near."""
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""

"""The one error that a user can cause: its message is a sentence saying what is wrong and what to do."""


class CatsError(Exception):
    """A wrong input or a missing prerequisite; the command line prints the message and exits with 2."""

"""The one error that a user can cause, one sentence; and the sentence for what the libraries below raise."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST = 200  # characters of a library's own words
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_cpu")
_WORDS = {
    MemoryError: "it needs more memory than there is",
    RecursionError: "it is nested too deeply",
    UnicodeDecodeError: "it is no UTF-8 text",
    UnicodeEncodeError: "it has characters that are no text",
    OverflowError: "it has a number out of range",
}
# Kinds of Python's own that input can cause; any other kind of Python's own is a fault of this project.
_BY_INPUT = (*_WORDS, OSError)


class CatsError(Exception):
    """A wrong input or a missing prerequisite; the command line prints the message and exits with 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The text " (did you mean X?)" with the nearest of `known`; nothing where none is near."""
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def reason(error: BaseException) -> str:
    """Why, in one line of a sentence: what an error of a library says, cut to 200 characters."""
    if _is_memory(error):
        return _WORDS[MemoryError]
    for kind, words in _WORDS.items():
        if isinstance(error, kind):
            return words
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror.lower() + (f": {error.filename}" if error.filename else "")
    if isinstance(error, KeyError):
        text = f"{error} is missing"
    line = " ".join(text.split()) or type(error).__name__
    return f"{line[:_LONGEST]}…" if len(line) > _LONGEST else line.rstrip(".")


@contextmanager
def explained(problem: str, advice: str) -> Iterator[None]:
    """Whatever is raised inside, but for CatsError, becomes the CatsError "<problem> (<reason>): <advice>."

    For the reading of one input: a file can be broken in more ways than there are kinds of errors.
    """
    try:
        yield
    except CatsError:
        raise
    except Exception as error:
        raise CatsError(f"{problem} ({reason(error)}): {advice}.") from error


def sentence(error: Exception) -> tuple[str, int]:
    """What a command says of an error that nothing has caught, and its exit code: 2, or 70 for our faults.

    A library's own kind of error speaks of files, memory, a device or the network; Python's own kinds, such
    as TypeError, speak of the code here.
    """
    if isinstance(error, CatsError):
        return str(error), 2
    if isinstance(error, ImportError) and error.name and not error.name.startswith("cats"):
        return f"{error.name} is missing: install this project's requirements.lock.", 2
    library = type(error).__module__.partition(".")[0].removesuffix("_rust")
    if isinstance(error, _BY_INPUT) or _is_memory(error):
        return f"{reason(error)} (CATS_TRACEBACK=1 shows where).", 2
    if library not in ("builtins", "cats", "cats_kernels"):
        return f"{library} ended with {reason(error)} (CATS_TRACEBACK=1 shows where).", 2
    return (
        f"this is a fault of the project, not yours ({type(error).__name__}: {reason(error)}): "
        "set CATS_TRACEBACK=1 to see the whole traceback, and report it.",
        70,
    )


def _is_memory(error: BaseException) -> bool:
    """Whether memory was short, of the machine or of a GPU: PyTorch says so in words, of several kinds."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and any(s in str(error) for s in _OUT_OF_MEMORY))

"""JSON as the standard has it, and fields of a document with their types: nothing is guessed or rounded."""

import json
import math
from collections.abc import Sequence


def parse(data: bytes) -> dict:
    """The object in UTF-8 JSON, with or without a byte order mark.

    Raises ValueError, whose text is a phrase, for text that is no JSON object, a key that stands twice,
    NaN or Infinity, numbers that no float holds, and nesting that is too deep.
    """
    try:
        document = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it may be truncated, line {error.lineno}") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if not isinstance(document, dict):
        raise ValueError("it is no object of names and values")
    return document


def _unique(pairs: Sequence[tuple[str, object]]) -> dict:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands in it twice")
    return document


def _refuse(name: str):
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is out of range")
    return value


def _bounded(digits: str) -> int:
    if len(digits) > 19:  # more than 64 bits
        raise ValueError(f"{digits[:20]}… is out of range")
    return int(digits)


def field(document: dict, name: str, kind: type):
    """The value of a field, of exactly this type; ValueError, naming the field, where it is not.

    `float` takes whole numbers too; `bool` is no number.
    """
    if name not in document:
        raise ValueError(f"it lacks {name!r}")
    value = document[name]
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        raise ValueError(f"{name!r} is not {'a number' if kind in (int, float) else 'a ' + kind.__name__}")
    return kind(value)


def count(document: dict, name: str) -> int:
    """A whole number of at least 0; ValueError, naming the field, for anything else."""
    value = field(document, name, int)
    if value < 0:
        raise ValueError(f"{name!r} is negative")
    return value

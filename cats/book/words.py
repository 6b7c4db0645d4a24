"""Numbers in words of a page: a no-break space before %, a true minus sign, and no negative zero."""

import re

from cats.evaluation.intervals import as_text

_PERCENT = re.compile(r"(?<=\d)[ \u00a0]?%")
_MINUS = re.compile(r"(?<![\w.,\]\)-])-(?=\.?\d)")
_NEGATIVE_ZERO = re.compile(r"−(?=0(?:\.0+)?(?!\d|\.\d))")


def tidy(text: str) -> str:
    """`text` with its numbers as the book writes them: "-3.0%" becomes "−3.0 %", "-0.0" becomes "0.0".

    A hyphen inside a name, such as "Llama-2-7B", or between two numbers stays what it is.
    """
    return _NEGATIVE_ZERO.sub("", _MINUS.sub("−", _PERCENT.sub("\u00a0%", text)))


def interval(value: float, low: float, high: float, *, digits: int = 3, scale: float = 1.0) -> str:
    """A signed value with its interval, "+0.123 [+0.045, +0.210]"; all three are multiplied by `scale`.

    The value alone where few documents give no interval.
    """
    return tidy(as_text(value, low, high, f"+.{digits}f", scale=scale))


def listed(names: list[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""

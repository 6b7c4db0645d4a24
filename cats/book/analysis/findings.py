"""Evidence for or against a claim of the paper, from one model's records, and what several add up to."""

from collections.abc import Sequence
from dataclasses import dataclass

from cats.book.words import interval

HOLDS, IN_PART, HOLDS_NOT = "holds", "holds in part", "does not hold"
OPEN, NOT_TESTED = "undecided", "not tested"


@dataclass(frozen=True)
class Finding:
    """One model's evidence: its numbers in words, and whether they meet the claim; None leaves it open."""

    model: str
    words: str
    holds: bool | None


def at_least(low: float, high: float, limit: float) -> bool | None:
    """True where a whole interval is at or above `limit`, False where it is below, None where it spans it."""
    return True if low >= limit else False if high < limit else None


def points(difference: dict) -> str:
    """A difference of two accuracies with its interval, in percentage points."""
    delta, low, high = (difference[key] for key in ("delta", "low", "high"))
    return interval(delta, low, high, digits=1, scale=100).replace(" [", " points [")


def overall(findings: Sequence[Finding]) -> str:
    """One verdict: it holds where every finding is for it, and does not where none is and one is against."""
    marks = {each.holds for each in findings}
    if not marks:
        return NOT_TESTED
    if True in marks:
        return HOLDS if marks == {True} else IN_PART
    return HOLDS_NOT if False in marks else OPEN

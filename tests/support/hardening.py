"""How many cases the tests of tests/slow take: a tenth each time, the other nine by `make harden`."""

import os

import pytest

PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))]
# Another number of cases in every part, such as CATS_HARDEN=0.1 for a look, or 10 for a night.
SCALE = float(os.environ.get("CATS_HARDEN", "1"))


def numbers(total: int, part: int) -> range:
    """The numbers of a part's cases, of `total` in all ten; each number is a seed, the same in every run."""
    each = max(1, round(total * SCALE / 10))
    return range(each * part, each * (part + 1))

"""The table "paper, reproduced, difference, tolerance, verdict": a line for each value that is reported."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from cats.book.html_table import ABSENT, Table
from cats.book.words import tidy

REPRODUCED, NOT_REPRODUCED, NOT_MEASURED = "reproduced", "not reproduced", "not measured"


def verdict(reported: float, reproduced: float | None, tolerance: float, *, differs: str = "") -> str:
    """Whether |reproduced - reported| <= tolerance, in the unit of both.

    `differs` says what was not the same as in the paper, such as "other model": then nothing is judged.
    """
    if reproduced is None:
        return NOT_MEASURED
    if differs:
        return f"not comparable ({differs})"
    # a hair of slack: 0.65 - 0.64 is 0.010000000000000009
    return REPRODUCED if abs(reproduced - reported) <= tolerance * (1 + 1e-9) else NOT_REPRODUCED


@dataclass(frozen=True)
class Comparison:
    """One line of the table "paper, reproduced, difference, tolerance, verdict, hardware".

    `quantity` names it with its unit; `reported` is the published number; `reproduced` None where it was
    not measured; `tolerance` as `verdict` has it; `differs` as `verdict` has it; `measured_on` names model
    and hardware.
    """

    key: str
    quantity: str
    reported: float
    reproduced: float | None
    tolerance: float
    measured_on: str
    digits: int = 3
    differs: str = ""
    source: str = ""

    @property
    def verdict(self) -> str:
        return verdict(self.reported, self.reproduced, self.tolerance, differs=self.differs)

    @property
    def difference(self) -> float | None:
        return None if self.reproduced is None else self.reproduced - self.reported

    def cells(self) -> dict[str, str]:
        """Every column as the text that is shown."""
        number = f"{{:.{self.digits}f}}".format
        texts = {
            "quantity": self.quantity,
            "paper": number(self.reported),
            "reproduced": ABSENT if self.reproduced is None else number(self.reproduced),
            "difference": ABSENT if self.difference is None else f"{self.difference:+.{self.digits}f}",
            "tolerance": f"± {number(self.tolerance)}",
            "verdict": self.verdict,
            "hardware": ABSENT if self.reproduced is None else self.measured_on,
        }
        return {column: tidy(text) for column, text in texts.items()}


def comparison_table(comparisons: Iterable[Comparison]) -> Table:
    """The comparisons as one table."""
    rows = [comparison.cells() for comparison in comparisons]
    frame = pd.DataFrame(rows).rename(columns={"quantity": "value"})
    return Table(frame, caption="What the paper reports, and what was measured here")

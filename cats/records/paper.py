"""What the paper, its rebuttal and later papers report, value by value, and how measurements compare."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from cats import paths
from cats.book.html_table import ABSENT, Table
from cats.errors import CatsError

COLUMNS = (
    *("item", "quantity", "model", "method", "gate_sparsity", "model_sparsity", "task"),
    *("dtype", "hardware", "new_tokens", "value", "unit", "evidence", "source"),
)
EVIDENCE = {
    "R": "read in the reference repository",
    "A": "computed from the repository's published artefacts",
    "S": "stated in the abstract or in the authors' rebuttal",
    "N": "third-party notes on the paper's last version",
    "P": "read in a later paper",
    "C": "stated by the makers of the model",
    "D": "derived by arithmetic",
}
# The paper's models by the names that `cats.models.load` takes.
MODELS = {
    "meta-llama/Llama-2-7b-hf": "Llama-2-7B",
    "meta-llama/Llama-2-13b-hf": "Llama-2-13B",
    "meta-llama/Llama-2-7b-chat-hf": "Llama-2-7B-chat",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B",
}
REPRODUCED, NOT_REPRODUCED, NOT_MEASURED = "reproduced", "not reproduced", "not measured"


@dataclass(frozen=True)
class Reported:
    """One value as published: its number, unit, the table or figure it stands in, and where it was read."""

    value: float
    unit: str
    item: str
    evidence: str
    source: str

    def __float__(self) -> float:
        return self.value


@functools.cache
def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(paths.in_clone(paths.PAPER) / f"{name}.csv")


def names() -> list[str]:
    """The tables of data/paper."""
    return sorted(file.stem for file in paths.in_clone(paths.PAPER).glob("*.csv"))


def table(name: str) -> pd.DataFrame:
    """The rows of data/paper/<name>.csv; raises CatsError for an unknown name."""
    if name not in names():
        raise CatsError(f"There is no table {name!r} of reported values: use one of {', '.join(names())}.")
    return _read(name).copy()


def reported(name: str, **keys) -> Reported:
    """The one value of the table `name` whose columns equal `keys`, such as model="Llama-2-7B".

    Raises CatsError for an unknown table or column, for a value that no row has, and where the keys leave
    several.
    """
    rows = table(name)
    for key, wanted in keys.items():
        if key not in rows.columns:
            raise CatsError(f"The table {name} has no column {key!r}: use some of {', '.join(rows.columns)}.")
        matching = rows[rows[key] == wanted]
        if matching.empty:
            held = ", ".join(map(str, rows[key].dropna().unique()[:8])) or "nothing"
            raise CatsError(f"The table {name} reports nothing for {key}={wanted!r} here: it has {held}.")
        rows = matching
    if len(rows) > 1:
        open_keys = [key for key in rows.columns[:10] if rows[key].nunique(dropna=False) > 1]
        raise CatsError(
            f"{len(rows)} values of the table {name} match {keys}: say which {' or '.join(open_keys)}."
        )
    row = rows.iloc[0]
    return Reported(float(row.value), row.unit, row["item"], row.evidence, row.source)


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
        return {
            "quantity": self.quantity,
            "paper": number(self.reported),
            "reproduced": ABSENT if self.reproduced is None else number(self.reproduced),
            "difference": ABSENT if self.difference is None else f"{self.difference:+.{self.digits}f}",
            "tolerance": f"± {number(self.tolerance)}",
            "verdict": self.verdict,
            "hardware": ABSENT if self.reproduced is None else self.measured_on,
        }


def comparison_table(comparisons: Iterable[Comparison]) -> Table:
    """The comparisons as one table."""
    rows = [comparison.cells() for comparison in comparisons]
    return Table(pd.DataFrame(rows).rename(columns={"quantity": ""}))

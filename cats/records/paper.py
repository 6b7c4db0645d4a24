"""What the paper, its rebuttal and later papers report, value by value."""

import functools
from dataclasses import dataclass

import pandas as pd

from cats import paths
from cats.errors import CatsError

COLUMNS = (
    *("item", "quantity", "model", "method", "gate_sparsity", "model_sparsity", "task"),
    *("dtype", "hardware", "new_tokens", "value", "unit", "evidence", "source"),
)
EVIDENCE = {
    "R": "read in the reference repository",
    "A": "computed from the repository's published artefacts",
    "S": "stated in the abstract, in the rebuttal or elsewhere in the discussion with the reviewers",
    "N": "third-party notes on a paper whose own text was not at hand",
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
            values = ", ".join(map(str, rows[key].dropna().unique()[:8])) or "nothing"
            raise CatsError(f"The table {name} reports nothing for {key}={wanted!r} here: it has {values}.")
        rows = matching
    if len(rows) > 1:
        open_keys = [key for key in rows.columns[:10] if rows[key].nunique(dropna=False) > 1]
        raise CatsError(
            f"{len(rows)} values of the table {name} match {keys}: say which {' or '.join(open_keys)}."
        )
    row = rows.iloc[0]
    return Reported(float(row.value), row.unit, row["item"], row.evidence, row.source)

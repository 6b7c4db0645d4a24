"""Analysis of variance of a sweep: how much of the spread of a result each choice, and each pair of them,
explains."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd

from cats.errors import CatsError

WITHIN = "repetitions"


@dataclass
class Analysis:
    """What `analyse` finds: `factors` with their `levels`, the `mean` of all cells and the `effects`.

    `effects` holds, for each set of factors by name, what its levels add to the sum of all smaller sets:
    an array with an axis for each of its factors. `total` is the sum of squares around the mean, `within` the
    part of it between repetitions of one cell.
    """

    response: str
    factors: tuple[str, ...]
    levels: tuple[tuple, ...]
    cells: np.ndarray
    mean: float
    effects: dict[tuple[str, ...], np.ndarray]
    sums: dict[tuple[str, ...], float]
    within: float

    @property
    def total(self) -> float:
        return sum(self.sums.values()) + self.within

    @property
    def table(self) -> pd.DataFrame:
        """A row for each choice and each interaction, largest first: effect, order (choices in it),
        degrees_of_freedom, sum_of_squares, share (of the total; of a constant result 0) and range (largest
        minus smallest of what it adds, in the unit of the result). Shares sum to 1.
        """
        rows = [
            {
                "effect": " × ".join(names),
                "order": len(names),
                "degrees_of_freedom": int(np.prod([size - 1 for size in effect.shape])),
                "sum_of_squares": self.sums[names],
                "share": self._share(self.sums[names]),
                "range": float(np.ptp(effect)),
            }
            for names, effect in self.effects.items()
        ]
        if self.within > 0:
            rows.append(
                {
                    "effect": WITHIN,
                    "order": len(self.factors) + 1,
                    "sum_of_squares": self.within,
                    "share": self._share(self.within),
                }
            )
        return pd.DataFrame(rows).sort_values("share", ascending=False, kind="stable", ignore_index=True)

    def explained(self, order: int = 2) -> float:
        """Share of the total by the effects of at most `order` choices together."""
        return self._share(sum(value for names, value in self.sums.items() if len(names) <= order))

    def extremes(self) -> tuple[dict, dict]:
        """Levels of the cells with the smallest and the largest mean result."""
        return tuple(
            {
                name: levels[place]
                for name, levels, place in zip(self.factors, self.levels, places, strict=True)
            }
            for places in self._ends()
        )

    def spread(self, order: int = 2) -> tuple[float, float]:
        """(largest minus smallest cell, the share of that difference by effects of at most `order` choices).

        The difference of two cells is the sum of the differences of their effects, so the share is exact; it
        is above 1 where larger interactions take some back, and 0 where all cells are equal.
        """
        low, high = self._ends()
        gap = float(self.cells[high] - self.cells[low])
        by_effects = sum(
            effect[self._places(names, high)] - effect[self._places(names, low)]
            for names, effect in self.effects.items()
            if len(names) <= order
        )
        return gap, float(by_effects) / gap if gap else 0.0

    def means(self, factor: str) -> pd.DataFrame:
        """For each level of one choice: level, mean, low and high of the cells that have it."""
        axis = self.factors.index(factor)
        moved = np.moveaxis(self.cells, axis, 0).reshape(len(self.levels[axis]), -1)
        return pd.DataFrame(
            {"level": self.levels[axis], "mean": moved.mean(1), "low": moved.min(1), "high": moved.max(1)}
        )

    def _ends(self) -> list[tuple]:
        """Where the smallest and the largest cell are."""
        return [np.unravel_index(choose(self.cells), self.cells.shape) for choose in (np.argmin, np.argmax)]

    def _places(self, names: tuple[str, ...], cell: tuple) -> tuple:
        return tuple(cell[self.factors.index(name)] for name in names)

    def _share(self, value: float) -> float:
        return value / self.total if self.total > 0 else 0.0


def analyse(rows: pd.DataFrame, response: str, factors: Sequence[str]) -> Analysis:
    """Split the variation of the column `response` among `factors` and all their interactions, exactly.

    For a balanced full factorial design: every combination of levels, equally often. Then effects are
    differences of plain means, orthogonal, and their sums of squares add up to the total in any order. A
    factor of one level explains nothing and is left out. Raises CatsError for missing columns and values,
    combinations that are missing or more frequent than others, and where no factor varies.
    """
    missing = [name for name in (response, *factors) if name not in rows.columns]
    if missing:
        raise CatsError(
            f"The sweep has no column {missing[0]!r}: it has {', '.join(map(str, rows.columns))}."
        )
    if rows[[response, *factors]].isna().any(axis=None):
        raise CatsError(
            f"The sweep has rows without {response} or without one of its choices: drop them first."
        )
    varied = tuple(name for name in factors if rows[name].nunique() > 1)
    if not varied:
        raise CatsError("No choice of the sweep has two levels: there is nothing to compare.")
    levels = tuple(tuple(dict.fromkeys(rows[name])) for name in varied)
    values = _cells(rows, response, varied, levels)
    cells = values.mean(-1)
    repetitions = values.shape[-1]
    effects, sums = {}, {}
    mean = float(cells.mean())
    for order in range(1, len(varied) + 1):
        for axes in combinations(range(len(varied)), order):
            others = tuple(axis for axis in range(len(varied)) if axis not in axes)
            effect = cells.mean(axis=others) - mean
            for smaller, known in _inside(effects, varied, axes):
                effect = effect - known.reshape(
                    [cells.shape[axis] if axis in smaller else 1 for axis in axes]
                )
            names = tuple(varied[axis] for axis in axes)
            effects[names] = effect
            sums[names] = float((effect**2).sum()) * cells.size / effect.size * repetitions
    within = float(((values - cells[..., None]) ** 2).sum())
    return Analysis(response, varied, levels, cells, mean, effects, sums, within)


def _inside(effects: dict, varied: tuple[str, ...], axes: tuple[int, ...]):
    """(axes, effect) of what is known of smaller sets of the same factors."""
    for names, known in effects.items():
        smaller = tuple(varied.index(name) for name in names)
        if len(smaller) < len(axes) and set(smaller) < set(axes):
            yield smaller, known


def _cells(
    rows: pd.DataFrame, response: str, varied: tuple[str, ...], levels: tuple[tuple, ...]
) -> np.ndarray:
    """The results as an array: an axis for each factor, the last one for repetitions."""
    found: dict[tuple, list[float]] = {}
    for *combination, value in rows[[*varied, response]].itertuples(index=False, name=None):
        found.setdefault(tuple(combination), []).append(float(value))
    counts = {len(values) for values in found.values()}
    for combination in product(*levels):
        if combination not in found:
            said = ", ".join(f"{name} {level}" for name, level in zip(varied, combination, strict=True))
            raise CatsError(f"The sweep lacks {said}: effects can be told apart only where all are there.")
    if len(counts) > 1:
        raise CatsError(
            f"The sweep has some combinations {min(counts)} times and others {max(counts)} times: "
            "give each as often as the others."
        )
    shape = [len(each) for each in levels]
    return np.array([found[combination] for combination in product(*levels)]).reshape(*shape, counts.pop())

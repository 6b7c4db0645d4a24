"""What the records say about fine-tuning, for each claim of the paper that other models can test."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import pandas as pd

from cats.book.analysis import recorded
from cats.book.analysis.claims_quality import LEVELS, SLACK, SLUGS
from cats.book.analysis.findings import Finding, at_least, points

_RUNS = (*(f"general-{slug}" for slug in SLUGS), "whole-smollm2-135m")
_TASKS = ("sst2-smollm2-135m", "boolq-smollm2-135m")
_CATS, _RELU = "cats 0.5", "relufication"


def below_relufication() -> Iterable[Finding]:
    """The loss of CATS at 50 % is below ReLUfication's after every number of steps, in every seed."""
    for run, rows in _runs():
        wide = rows[rows.step > 0].pivot_table(
            index=["seed", "step"], columns="method", values="heldout_nll_nats"
        )
        gap = (wide[_RELU] - wide[_CATS]).groupby("step").mean()
        words = f"below by {gap.iloc[0]:.2f} nats after {gap.index[0]:,} steps, {gap.iloc[-1]:.2f} after "
        yield Finding(run, f"{words}{gap.index[-1]:,}", bool((wide[_RELU] > wide[_CATS]).all()))


def more_accurate(levels: tuple[float, ...]) -> Iterable[Finding]:
    """The mean accuracy of CATS after the last step is above ReLUfication's at each sparsity and seed."""
    for run, rows in _runs():
        wide = _ends(rows, "zero_shot_avg")
        for level in levels:
            if f"cats {level}" in wide:
                gap = 100 * (wide[f"cats {level}"] - wide[_RELU])
                yield Finding(run, f"{_spread(gap)} points at {level:.0%}", _signs(gap))


def accuracy_rises() -> Iterable[Finding]:
    """The mean accuracy of CATS at 50 % after the last step is above that before the first, in every seed."""
    for run, rows in _runs():
        gap = 100 * (_ends(rows, "zero_shot_avg")[_CATS] - _starts(rows, "zero_shot_avg")[_CATS])
        yield Finding(run, f"{_spread(gap)} points", _signs(gap))


def loss_falls() -> Iterable[Finding]:
    """Training lowers the loss of CATS at 50 %, in every seed."""
    for run, rows in _runs():
        fall = _starts(rows, "heldout_nll_nats")[_CATS] - _ends(rows, "heldout_nll_nats")[_CATS]
        yield Finding(run, f"{_spread(-fall, 3)} nats", _signs(fall))


def gap_closes(most: float) -> Iterable[Finding]:
    """The gap of CATS at 50 % to a dense model trained as long, after over before, at most `most`."""
    for run, rows in _runs():
        first, last = _starts(rows, "delta_nll")[_CATS], _ends(rows, "delta_nll")[_CATS]
        shares = last / first
        words = f"{first.mean():+.3f} nats before, {last.mean():+.3f} after {rows.step.max():,} steps"
        yield Finding(run, words, _signs(most - shares))


def sparsity_kept() -> Iterable[Finding]:
    """Sparsity after the last step, within 2 points of the target."""
    for run, rows in _runs():
        ends = _ends(rows, "realised_sparsity").mean()
        reached = {level: ends[f"cats {level}"] for level in LEVELS if f"cats {level}" in ends}
        words = ", ".join(f"{value:.1%} for {level:.0%}" for level, value in reached.items())
        yield Finding(run, words, all(abs(value - level) <= SLACK for level, value in reached.items()))


def task_accuracy() -> Iterable[Finding]:
    """Test accuracy at the checkpoint that the held-out part of the training data chooses.

    The two runs are compared as independent, which makes the interval too wide rather than too narrow.
    """
    for slug in _TASKS:
        record = recorded.find("finetuning", slug)
        if record is None:
            continue
        documents = record.content["data"]["heldout"]["documents"]
        chosen = record.rows.sort_values("indomain_accuracy", kind="stable").groupby("method").last()
        first, second = chosen.accuracy[_RELU], chosen.accuracy[_CATS]
        error = 1.96 * math.sqrt((first * (1 - first) + second * (1 - second)) / documents)
        found = {
            "delta": second - first,
            "low": second - first - error,
            "high": second - first + error,
        }
        words = f"{slug.split('-')[0]} {second:.1%} against {first:.1%}, {points(found)}, n = {documents:,}"
        yield Finding(record.content["model"]["id"], words, at_least(found["low"], found["high"], 0))


def _runs() -> Iterable[tuple[str, pd.DataFrame]]:
    """The name of each long run and its rows, those of models calibrated again left out."""
    for slug in _RUNS:
        rows = recorded.rows("finetuning", [slug])
        if len(rows):
            rows = rows[~rows.method.str.contains("recalibrated")]
            seeds = rows.seed.nunique()
            name = f"{rows.model.iloc[0]}, {rows.step.max():,} steps, {seeds} seed{'s' * (seeds > 1)}"
            yield name, rows


def _starts(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """`column` before the first step: one row a seed, one column a method."""
    return rows[rows.step == 0].pivot_table(index="seed", columns="method", values=column)


def _ends(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """`column` after the last step: one row a seed, one column a method."""
    return rows[rows.step == rows.step.max()].pivot_table(index="seed", columns="method", values=column)


def _spread(values: pd.Series, digits: int = 1) -> str:
    """Mean, and the range over seeds where there are several."""
    if len(values) == 1:
        return f"{values.iloc[0]:+.{digits}f}"
    return f"{values.mean():+.{digits}f} (seeds {values.min():+.{digits}f} to {values.max():+.{digits}f})"


def _signs(values: pd.Series) -> bool | None:
    """True where every seed is above 0, False where none is, None where they disagree."""
    return at_least(values.min(), values.max(), 0)


TESTS: dict[str, Callable[[], Iterable[Finding]]] = {
    "converges-faster": below_relufication,
    "tuned-better": partial(more_accurate, (0.5, 0.7)),
    "accuracy-rises": accuracy_rises,
    "tuned-loss-falls": loss_falls,
    "tuned-gap-closes": partial(gap_closes, 0.75),
    "sparsity-kept": sparsity_kept,
    "task-tuned-better": task_accuracy,
}

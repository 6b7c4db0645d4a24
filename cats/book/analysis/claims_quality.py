"""What the records say about the quality of CATS, for each claim of the paper that other models can test."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pandas as pd

from cats.book.analysis import recorded
from cats.book.analysis.findings import Finding, at_least, points
from cats.core.thresholds import Thresholds
from cats.evaluation.intervals import difference, mean_difference
from cats.evaluation.table import AVERAGE
from cats.evaluation.task_list import PAPER, stock
from cats.paths import THRESHOLDS
from cats.records.packing import unpack

# Records of whole test sets and texts; those of the paper's models are looked for too.
SLUGS = (
    *("smollm2-135m", "gemma-3-270m", "qwen2.5-coder-1.5b"),
    *("llama-2-7b", "llama-2-13b", "llama-2-7b-chat", "mistral-7b"),
)
LEVELS = (0.5, 0.7, 0.9)
SLACK = 0.02  # of a sparsity


def share_kept(least: float, sparsity: float = 0.5) -> Iterable[Finding]:
    """Mean accuracy of CATS as a share of dense, at least `least`."""
    for model, rows in _averages():
        row = _one(rows, "cats", sparsity)
        if row is not None:
            base = row.acc - row.delta_acc
            share, low, high = (1 + delta / base for delta in (row.delta_acc, row.delta_low, row.delta_high))
            yield Finding(
                model,
                f"{share:.1%} of dense [{low:.1%}, {high:.1%}], n = {row.documents:,}",
                at_least(low, high, least),
            )


def better_mean(rule: str, wins: int = 0) -> Iterable[Finding]:
    """CATS at 50 % has a higher mean accuracy than `rule`, and is ahead in `wins` tasks at least."""
    for model, found, ahead, words in _against(rule):
        mean = at_least(found["low"], found["high"], 0)
        yield Finding(model, words, mean if ahead >= wins else False)


def wins(rule: str, least: int) -> Iterable[Finding]:
    """CATS at 50 % is ahead of `rule` in `least` of the eight tasks or more, whatever the margins."""
    for model, _, ahead, words in _against(rule):
        yield Finding(model, words, ahead >= least)


def _against(rule: str) -> Iterable[tuple[str, dict, int, str]]:
    """Model, paired difference of the means (CATS - `rule`), tasks in which CATS is ahead, both in words."""
    for model, rows in _tasks():
        pairs = [(_scores(rows, rule, None, task), _scores(rows, "cats", 0.5, task)) for task in PAPER]
        if any(len(each) == 0 for pair in pairs for each in pair):
            continue
        found = mean_difference(pairs)
        ahead = sum(second.mean() > first.mean() for first, second in pairs)
        yield model, found, ahead, f"{points(found)}, ahead in {ahead} of {len(PAPER)} tasks"


def robust_with_size() -> Iterable[Finding]:
    """The share of dense that CATS at 50 % keeps, from the smallest model to the largest."""
    sizes = []
    for slug in SLUGS:
        record = recorded.find("zero_shot", slug)
        rows = recorded.rows("zero_shot", [slug])
        row = _one(rows[rows.task == AVERAGE], "cats", 0.5) if len(rows) else None
        if row is not None:
            sizes.append((record.content["model"]["parameters"], row.acc / (row.acc - row.delta_acc)))
    if len(sizes) > 1:
        shares = [share for _, share in sorted(sizes)]
        words = ", ".join(f"{size / 1e6:,.0f} million {share:.1%}" for size, share in sorted(sizes))
        yield Finding("all models", words, bool(np.all(np.diff(shares) > 0)))


def falls_with_sparsity() -> Iterable[Finding]:
    """Mean accuracy at 50, 70 and 90 %, as many as were measured."""
    for model, rows in _averages():
        found = [(level, _one(rows, "cats", level)) for level in LEVELS]
        found = [(level, row.acc) for level, row in found if row is not None]
        words = ", ".join(f"{level:.0%} {value:.3f}" for level, value in found)
        if len(found) > 1:
            yield Finding(model, words, bool(np.all(np.diff([value for _, value in found]) < 0)))


def loss_rise(limit: float) -> Iterable[Finding]:
    """Rise of the loss at 50 %, at most `limit` nats, on each text."""
    for slug in SLUGS:
        rows = recorded.rows("perplexity", [slug])
        if not len(rows):
            continue
        rows = rows[(rows.rule == "cats") & (rows.gate_sparsity == 0.5)]
        words = [
            f"{row.delta_nll:+.3f} [{row.delta_low:+.3f}, {row.delta_high:+.3f}] nats on {row.corpus}"
            for row in rows.itertuples()
        ]
        yield Finding(
            rows.model.iloc[0],
            ", ".join(words),
            at_least(-rows.delta_high.max(), -rows.delta_low.min(), -limit),
        )


def maths_kept(least: float, sparsity: float) -> Iterable[Finding]:
    """The share of the dense GSM8K score that CATS keeps."""
    for model, rows in _maths():
        row = _one(rows, "cats", sparsity)
        if row is not None:
            base = _one(rows, "dense", 0).exact_match
            low, high = 1 + row.delta_low / base, 1 + row.delta_high / base
            words = f"{row.exact_match:.1%} of {base:.1%} solved, {row.exact_match / base:.0%} kept"
            yield Finding(
                model, f"{words} [{low:.0%}, {high:.0%}], n = {row.documents:,}", at_least(low, high, least)
            )


def maths_beats_wanda() -> Iterable[Finding]:
    """GSM8K of CATS at 50 and 70 % against Wanda's, on the same problems."""
    for model, rows in _maths():
        wanda = _one(rows, "wanda", None)
        found = [(level, _one(rows, "cats", level)) for level in LEVELS]
        for level, row in found:
            if row is not None and wanda is not None:
                both = difference(unpack(wanda.correct), unpack(row.correct))
                yield Finding(model, f"{points(both)} at {level:.0%}", at_least(both["low"], both["high"], 0))


def near_zero() -> Iterable[Finding]:
    """Layers whose |z| is densest in the first of steps of 0.05, from the quantiles that come along."""
    thresholds = Thresholds.load(THRESHOLDS / "smollm2-135m-instruct.json")
    levels = np.linspace(0, 0.99, 100)
    values = np.stack([thresholds.at(float(level)).flatten().numpy() for level in levels])
    edges = np.arange(0, 0.41, 0.05)
    shares = [np.diff(np.interp(edges, layer, levels)) for layer in np.maximum.accumulate(values).T]
    first = sum(int(share.argmax()) == 0 for share in shares)
    words = f"densest below {edges[1]:.2f} in {first} of {len(shares)} layers"
    yield Finding(thresholds.model["id"], words, first == len(shares))


def target_met() -> Iterable[Finding]:
    """Sparsity of all layers together on the eight tasks, within 2 points of the target."""
    for model, rows in _averages():
        found = [(level, _one(rows, "cats", level)) for level in LEVELS]
        reached = {level: row.realised_sparsity for level, row in found if row is not None}
        words = ", ".join(f"{value:.1%} for {level:.0%}" for level, value in reached.items())
        yield Finding(model, words, all(abs(value - level) <= SLACK for level, value in reached.items()))


def few_rows(limit: float) -> Iterable[Finding]:
    """The loss at 50 % with thresholds from 100, 500 and 1,000 rows of one text."""
    rows = recorded.rows("perplexity", [f"disputes-smollm2-135m-{n}-rows" for n in (100, 500, 1000)])
    rows = rows[(rows.rule == "cats") & (rows.gate_sparsity == 0.5)]
    words = ", ".join(
        f"{int(row.record.split('-')[-2]):,} rows {row.nll_nats:.3f}" for row in rows.itertuples()
    )
    spread = rows.nll_nats.max() - rows.nll_nats.min()
    yield Finding(rows.model.iloc[0], f"{words} nats, {spread:.3f} apart", bool(spread <= limit))


def task_agnostic(limit: float) -> Iterable[Finding]:
    """Mean accuracy at 50 % with thresholds from prose about Python and from plays, on the same documents."""
    slugs = ("transfer-from-python-docs", "transfer-from-shakespeare")
    first, second = (recorded.rows("zero_shot", [slug]) for slug in slugs)
    tasks = [task for task in first.task.unique() if task in set(second.task)]
    pairs = [tuple(_scores(rows, "cats", 0.5, stock(task)) for rows in (first, second)) for task in tasks]
    found = mean_difference(pairs)
    low, high = found["low"], found["high"]
    words = f"{points(found)} over {len(tasks)} tasks"
    outside = low > limit or high < -limit
    inside = -limit <= low and high <= limit
    yield Finding(first.model.iloc[0], words, True if inside else False if outside else None)


def _averages() -> Iterable[tuple[str, pd.DataFrame]]:
    for model, rows in _tasks():
        yield model, rows[rows.task == AVERAGE]


def _tasks() -> Iterable[tuple[str, pd.DataFrame]]:
    for slug in SLUGS:
        rows = recorded.rows("zero_shot", [slug])
        if len(rows):
            yield rows.model.iloc[0], rows


def _maths() -> Iterable[tuple[str, pd.DataFrame]]:
    for slug in SLUGS:
        rows = recorded.rows("generation", [f"{slug}-gsm8k"])
        if len(rows):
            yield rows.model.iloc[0], rows


def _one(rows: pd.DataFrame, rule: str, sparsity: float | None):
    """The row of a rule at a sparsity (None for a rule that has none), None where it was not measured."""
    at = rows.gate_sparsity.isna() if sparsity is None else rows.gate_sparsity == sparsity
    found = rows[(rows.rule == rule) & at]
    return next(found.itertuples(), None)


def _scores(rows: pd.DataFrame, rule: str, sparsity: float | None, task: str) -> np.ndarray:
    row = _one(rows[rows.task.map(stock) == task], rule, sparsity)
    return np.array([]) if row is None else unpack(row.correct)


TESTS: dict[str, Callable[[], Iterable[Finding]]] = {
    "within-2-percent": partial(share_kept, 0.98),
    "keeps-99-percent": partial(share_kept, 0.985),
    "beats-relufication": partial(better_mean, "relufication", len(PAPER)),
    "beats-wanda": partial(better_mean, "wanda"),
    "wins-most-tasks": partial(wins, "wanda", 5),
    "robust-with-size": robust_with_size,
    "accuracy-falls-with-sparsity": falls_with_sparsity,
    "loss-close": partial(loss_rise, 0.027),
    "maths-kept": partial(maths_kept, 0.95, 0.5),
    "maths-beats-wanda": maths_beats_wanda,
    "maths-collapses": partial(maths_kept, 0.5, 0.7),
    "near-zero": near_zero,
    "target-met": target_met,
    "few-rows": partial(few_rows, 0.02),
    "task-agnostic": partial(task_agnostic, 0.01),
}

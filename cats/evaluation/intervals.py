"""Compare two models on the same documents: paired differences with an interval, and McNemar's test."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, t

from cats.errors import CatsError

RESAMPLES = 10_000
_CHUNK = 1 << 22  # draws held at a time: 32 MB


def difference(
    baseline: Sequence[float],
    other: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """Mean of `other` minus `baseline` over the same documents, with a percentile bootstrap interval.

    Scores are one number a document: 0 or 1, or a log-probability. Returns delta, low, high, and for scores
    of 0 and 1 alone mcnemar_p (exact, two-sided) with the documents that only one of the two got right:
    gained, lost. Raises CatsError unless both are of one length, two documents at least.
    """
    first, second = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    if first.shape != second.shape or first.ndim != 1:
        raise CatsError(
            f"Scores of {len(first)} and {len(second)} documents cannot be paired: "
            "evaluate both on the same ones."
        )
    if len(first) < 2:
        raise CatsError("An interval over documents needs two documents at least: evaluate more.")
    steps = second - first
    low, high = np.quantile(_means(steps, resamples, seed), [(1 - level) / 2, (1 + level) / 2])
    result = {"delta": float(steps.mean()), "low": float(low), "high": float(high)}
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        result |= mcnemar(int((steps > 0).sum()), int((steps < 0).sum()))
    return result


def mean_difference(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """The plain mean over tasks of `other` minus `baseline`, each task's documents drawn anew: delta, low,
    high.
    """
    steps = [np.asarray(other, dtype=float) - np.asarray(baseline, dtype=float) for baseline, other in pairs]
    if not steps or any(len(part) < 2 for part in steps):
        raise CatsError("An average over tasks needs tasks with two documents at least.")
    draws = np.mean([_means(part, resamples, seed + number) for number, part in enumerate(steps)], axis=0)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return {"delta": float(np.mean([part.mean() for part in steps])), "low": float(low), "high": float(high)}


def mcnemar(gained: int, lost: int) -> dict:
    """McNemar's exact test from the documents that only one of two models got right: mcnemar_p, gained,
    lost.
    """
    p = 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)
    return {"mcnemar_p": p, "gained": gained, "lost": lost}


def over_seeds(values: Sequence[float], *, level: float = 0.95) -> dict:
    """The mean of one value for each seed of training or calibration, with Student's t interval: delta, low,
    high; low and high are None for a single seed.
    """
    values = np.asarray(values, dtype=float)
    found = {"delta": float(values.mean()), "low": None, "high": None}
    if len(values) > 1:
        half = float(t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
        found |= {"low": found["delta"] - half, "high": found["delta"] + half}
    return found


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` draws with replacement; equal values are drawn together, which is exact and
    fast.
    """
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    rows = max(1, _CHUNK // len(distinct))
    parts = []
    for start in range(0, resamples, rows):
        draws = generator.multinomial(len(values), counts / len(values), size=min(rows, resamples - start))
        parts.append(draws @ distinct / len(values))
    return np.concatenate(parts)

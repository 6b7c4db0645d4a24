"""Every standard error, interval and paired test over documents, and what comparisons of methods make of
them."""

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import pandas as pd
from scipy.stats import binomtest, t

from cats.errors import CatsError

RESAMPLES = 10_000
# Below FEWEST documents there is no interval. Below FEW it is Student's: of 95 % intervals over 8 to 20
# normal, skewed or three-valued differences it holds the mean in 88 to 95 %, the bootstrap in 73 to 95 %.
FEWEST, FEW = 8, 30
BOOTSTRAP, STUDENT = "percentile bootstrap", "t"
_CHUNK = 1 << 22  # draws in memory at a time: 32 MB


class Difference(TypedDict):
    """A paired difference; `low`, `high` and `interval` are None below FEWEST documents."""

    delta: float  # mean of the other model minus the baseline
    low: float | None  # ends of the interval
    high: float | None
    interval: str | None  # how it was made: BOOTSTRAP or STUDENT


class RunnerUp(Difference):
    """The best method against the second; `delta` is the lead of the best, at least 0."""

    best: str
    second: str
    level: float  # of the interval, raised because the best and the second were picked from among several
    tie: bool | None  # whether the interval holds 0; None without an interval


def standard_error(values: Sequence[float]) -> float:
    """Of the mean over documents; NaN for a single one."""
    values = np.asarray(values, dtype=float)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def summarise(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Metrics and their standard errors under "<metric>_se": means of one score for each document, and
    perplexities from sums of log-probabilities."""
    metrics: dict[str, float] = {}
    for name, values in scores.items():
        if values.ndim == 2:
            metrics |= _rates(name, values[:, 0], values[:, 1])
        elif name == "perplexity":
            value = math.exp(-values.mean())
            metrics |= {name: value, f"{name}_se": value * standard_error(values)}
        else:
            metrics |= {name: float(values.mean()), f"{name}_se": standard_error(values)}
    return metrics


def difference(
    baseline: Sequence[float],
    other: Sequence[float],
    *,
    units: Sequence[float] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """Mean of `other` minus `baseline` over the same documents: a `Difference`.

    Scores are one number for each document: 0 or 1, or a log-probability. With `units` (tokens of each
    document) the scores are sums over a document, and the mean is a ratio of sums: long documents weigh more.
    Scores of 0 and 1 alone also give what `mcnemar` gives. Raises CatsError unless both have one length.
    """
    first, second = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    if first.shape != second.shape or first.ndim != 1:
        raise CatsError(
            f"Scores of {len(first)} and {len(second)} documents cannot be paired: "
            "evaluate both on the same ones."
        )
    if len(first) == 0:
        raise CatsError("No document was scored: evaluate one at least.")
    steps = second - first
    weights = np.ones(len(steps)) if units is None else np.asarray(units, dtype=float)
    delta = float(steps.sum() / weights.sum())
    result = Difference(delta=delta, low=None, high=None, interval=None)
    if len(steps) >= FEW:
        ends = np.quantile(_bootstrap(steps, weights, resamples, seed), [(1 - level) / 2, (1 + level) / 2])
        result |= {"low": float(ends[0]), "high": float(ends[1]), "interval": BOOTSTRAP}
    elif len(steps) >= FEWEST:
        error = standard_error(steps - delta * weights) / weights.mean()  # delta method
        result |= _student(delta, error, len(steps) - 1, level)
    if units is None and np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        result |= mcnemar(int((steps > 0).sum()), int((steps < 0).sum()))
    return result


def paired_interval(baseline: pd.DataFrame, other: pd.DataFrame, **options) -> dict:
    """`difference`, with its `options`, between two results of `cats.evaluation.perplexity.document_nll`:
    delta_nll, delta_low and delta_high in nats a token, and `interval`.

    Raises CatsError unless both scored the same tokens of the same documents.
    """
    columns = ["document", "tokens"]
    if len(baseline) != len(other) or not (baseline[columns].values == other[columns].values).all():
        raise CatsError("The two results are not of the same documents and tokens: score both on one corpus.")
    compared = difference(
        baseline.nll_nats.to_numpy(), other.nll_nats.to_numpy(), units=baseline.tokens.to_numpy(), **options
    )
    names = {"delta": "delta_nll", "low": "delta_low", "high": "delta_high", "interval": "interval"}
    return {name: compared[key] for key, name in names.items()}


def mean_difference(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The plain mean over tasks of `other` minus `baseline`, each task's documents drawn anew.

    The task with the fewest documents decides which interval there is; Student's takes its degrees of freedom
    from Welch and Satterthwaite. Raises CatsError where there is no task, or one without documents.
    """
    steps = [np.asarray(other, dtype=float) - np.asarray(baseline, dtype=float) for baseline, other in pairs]
    if not steps or any(len(part) == 0 for part in steps):
        raise CatsError("An average over tasks needs tasks with one document at least.")
    delta = float(np.mean([part.mean() for part in steps]))
    fewest = min(map(len, steps))
    if fewest >= FEW:
        draws = np.mean(
            [_bootstrap(part, np.ones(len(part)), resamples, seed + n) for n, part in enumerate(steps)],
            axis=0,
        )
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return Difference(delta=delta, low=float(low), high=float(high), interval=BOOTSTRAP)
    if fewest >= FEWEST:
        variances = np.array([standard_error(part) ** 2 for part in steps])
        total = variances.sum()
        freedom = total**2 / (variances**2 / [len(part) - 1 for part in steps]).sum() if total else 1.0
        return {"delta": delta, **_student(delta, math.sqrt(total) / len(steps), freedom, level)}
    return Difference(delta=delta, low=None, high=None, interval=None)


def against_runner_up(
    scores: Mapping[str, Sequence[float]],
    *,
    units: Sequence[float] | None = None,
    lower_is_better: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> RunnerUp:
    """The best of several methods against the second best, on the same documents.

    `scores`: those of each method, as `difference` takes them with `units`. The best was chosen by looking at
    all k methods, so the interval has level 1 - (1 - level) / (k - 1), Bonferroni's for comparisons of one
    method to all others. Raises CatsError for fewer than two methods.
    """
    if len(scores) < 2:
        raise CatsError("The best and the second best need two methods at least.")
    sign = -1.0 if lower_is_better else 1.0
    totals = {name: sign * float(np.sum(values)) for name, values in scores.items()}
    best, second = sorted(totals, key=totals.get, reverse=True)[:2]
    raised = 1 - (1 - level) / (len(scores) - 1)
    compared = difference(
        sign * np.asarray(scores[second], dtype=float),
        sign * np.asarray(scores[best], dtype=float),
        units=units,
        level=raised,
        seed=seed,
    )
    parts = {key: compared[key] for key in ("delta", "low", "high", "interval")}
    tie = None if parts["low"] is None else parts["low"] <= 0
    return RunnerUp(best=best, second=second, level=raised, tie=tie, **parts)


def share_above_chance(score: float, dense: float, chance: float) -> float:
    """What a method keeps of what the dense model knows: (score - chance) / (dense - chance).

    All three are accuracies in [0, 1]. NaN where the dense model is no better than chance.
    """
    return (score - chance) / (dense - chance) if dense > chance else math.nan


def at_equal_bytes(realised_bytes: Sequence[float], scores: Sequence[float], wanted: float) -> float | None:
    """A rule's score at `wanted` bytes a token, by linear interpolation between its measured points.

    `realised_bytes` and `scores`: what each sparsity of the rule read and reached, in any order. None outside
    the measured points: nothing is extrapolated. Raises CatsError unless both have one length, two points at
    least, and no two points with the same bytes.
    """
    order = np.argsort(realised_bytes)
    x, y = np.asarray(realised_bytes, dtype=float)[order], np.asarray(scores, dtype=float)
    if len(x) != len(y) or len(x) < 2 or (np.diff(x) <= 0).any():
        raise CatsError("A curve needs a score at each of two or more different numbers of bytes.")
    return float(np.interp(wanted, x, y[order])) if x[0] <= wanted <= x[-1] else None


def as_text(
    delta: float | None, low: float | None, high: float | None, form: str = "+.4f", *, scale: float = 1.0
) -> str:
    """A difference with its interval as tables show it, all three multiplied by `scale`.

    The difference alone where there is no interval, and "-" where there is no difference.
    """
    shown = [format(scale * v, form) for v in (delta, low, high) if v is not None and v == v]
    return "{} [{}, {}]".format(*shown) if len(shown) == 3 else (shown or ["-"])[0]


def over_seeds(values: Sequence[float], *, level: float = 0.95) -> dict:
    """The mean of one value for each seed of training or calibration, with Student's interval: delta, low and
    high, of which the last two are None for a single seed."""
    values = np.asarray(values, dtype=float)
    delta = float(values.mean())
    if len(values) < 2:
        return {"delta": delta, "low": None, "high": None}
    ends = _student(delta, standard_error(values), len(values) - 1, level)
    return {"delta": delta, "low": ends["low"], "high": ends["high"]}


def mcnemar(gained: int, lost: int) -> dict:
    """McNemar's exact two-sided test from the documents that only one of two models got right: mcnemar_p, and
    both counts."""
    p = 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)
    return {"mcnemar_p": p, "gained": gained, "lost": lost}


def _student(delta: float, error: float, freedom: float, level: float) -> dict:
    half = float(t.ppf((1 + level) / 2, freedom) * error)
    return {"low": delta - half, "high": delta + half, "interval": STUDENT}


def _bootstrap(sums: np.ndarray, units: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Σ sums / Σ units of `resamples` draws of documents with replacement.

    Equal documents are drawn together by their multinomial counts, which is exact and fast.
    """
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(np.stack([sums, units], axis=1), axis=0, return_counts=True)
    rows = max(1, _CHUNK // len(distinct))
    parts = []
    for start in range(0, resamples, rows):
        draws = generator.multinomial(len(sums), counts / len(sums), size=min(rows, resamples - start))
        totals = draws @ distinct
        parts.append(totals[:, 0] / totals[:, 1])
    return np.concatenate(parts)


def _rates(name: str, logs: np.ndarray, units: np.ndarray) -> dict[str, float]:
    """exp(-Σ log-probability / Σ units), or that in bits, with a standard error over documents (delta
    method)."""
    rate = -logs.sum() / units.sum()
    spread = standard_error(-logs - rate * units) / units.mean()
    if name == "bits_per_byte":
        return {name: rate / math.log(2), f"{name}_se": spread / math.log(2)}
    if name == "nll":
        both = {"nll_nats": rate, "nll_nats_se": spread, "perplexity": math.exp(rate)}
        return {**both, "perplexity_se": math.exp(rate) * spread}
    return {name: math.exp(rate), f"{name}_se": math.exp(rate) * spread}

"""Rules side by side at the same bytes: what they drop, which kernels exist for them, and who is best."""

from collections.abc import Sequence

import pandas as pd

from cats import criteria
from cats.book.analysis import recorded
from cats.criteria.sited import InputRule
from cats.errors import CatsError
from cats.evaluation.table import AVERAGE

NEURONS = "neurons, by the gate"
UP = "neurons, by the up projection"
MLP_INPUTS = "inputs of the MLP"
ALL_INPUTS = "inputs of every linear layer"
SEQUENCE = "one set of neurons a sequence"
FAMILIES = (NEURONS, UP, MLP_INPUTS, ALL_INPUTS, SEQUENCE)

OWN = "here: Triton, fp16 and bf16, small batches, CUDA graphs; the paper's: Triton, 1 to 4 rows"
SAME = "that of CATS as it is: a threshold for each neuron costs no more"
NONE = "none known"
# Of each rule, the kernel that decodes with it: from the sources' repositories and papers, read in 2026.
KERNELS = {
    "cats": OWN,
    **dict.fromkeys(("centred", "refit-centred"), "here: Triton, one row"),
    "up-threshold": "FloE: on the design of CATS, for experts of a mixture; COUNTDOWN: Triton, by its paper",
    "scap": "the down kernel of CATS, in fp32",
    "teal": "its own: Triton, fp16, one row",
    "teal-greedy": "that of teal; its code decodes with uniform shares",
    "wina": "announced, not in its repository",
    "wina-greedy": "announced, not in its repository",
    "wina-released": "announced, not in its repository",
    "r-sparse": "none called by its code, which carries that of CATS",
    "griffin": "none needed: smaller dense matrices",
    "sirius": "compiled steps of PyTorch 2.3.0 for its own models",
    **dict.fromkeys(("top-k", "statistical-top-k", "statistical-magnitude"), NONE),
}


def family(name: str) -> str:
    """What a rule drops, one of FAMILIES; CatsError for an unknown rule."""
    rule = criteria.rule(name)
    if isinstance(rule, InputRule):
        return ALL_INPUTS
    return {"up-threshold": UP, "scap": MLP_INPUTS, "griffin": SEQUENCE}.get(name, NEURONS)


def kernel(name: str) -> str:
    """Which kernel decodes with a rule, in a few words."""
    return KERNELS.get(name, SAME if family(name) == NEURONS else NONE)


def read_bytes(rows: pd.DataFrame) -> pd.Series:
    """Weight bytes that the evaluated tokens would have read at batch 1, by the sparsity they realised.

    `rows` of one model: rule, bytes_per_token (at the target), model_sparsity (the target) and
    realised_model_sparsity. Bytes fall in proportion to the weights that a token does without. Raises
    CatsError where the dense model is not among them.
    """
    dense = rows.bytes_per_token[rows.rule == criteria.DENSE]
    if dense.empty:
        raise CatsError(
            "The bytes of sparse rows are told from dense ones: evaluate the dense model as well."
        )
    whole = float(dense.iloc[0])
    saved = (whole - rows.bytes_per_token) * rows.realised_model_sparsity / rows.model_sparsity
    return whole - saved.where(rows.model_sparsity > 0, 0.0)


def front(cost: Sequence[float], loss: Sequence[float]) -> list[bool]:
    """Whether each point is Pareto-optimal: no other has at most its cost and its loss, and less of one."""
    points = list(zip(cost, loss, strict=True))
    return [not any(_beats(other, point) for other in points) for point in points]


def placed(rows: pd.DataFrame, lost: str = "delta_nll") -> pd.DataFrame:
    """The sparse rows of one model and text, with level (the model-level target), megabytes and lost (the
    column `lost`: nats).

    `rows` as the experiment `perplexity` has them, with those of the dense model.
    """
    rows = rows.assign(level=_levels(rows), megabytes=read_bytes(rows) / 1e6)
    rows = rows[rows.rule != criteria.DENSE]
    return rows.assign(lost=rows[lost].astype(float)).sort_values(["level", "lost"], kind="stable")


def averages(tasks: pd.DataFrame) -> pd.DataFrame:
    """The averages of the eight tasks of one model as `placed` has them, lost in percentage points.

    `tasks`: rows of `zero_shot`. Raises CatsError where they have no average of a sparse model.
    """
    mean = tasks[tasks.task == AVERAGE]
    mean = mean.assign(points=-100 * mean.delta_acc.astype(float))
    if (mean.rule == criteria.DENSE).all():
        raise CatsError("The record has no average of the eight tasks: evaluate all of them.")
    return placed(mean, "points")


def reached(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of `placed` that did without nine tenths of their target: a rule that reads a prompt dense does
    not.
    """
    return rows[rows.realised_model_sparsity > 0.9 * rows.level]


def missing(rows: pd.DataFrame, names: Sequence[str], levels: Sequence[float]) -> list[str]:
    """What of `names` at `levels` is not among rows of `placed`: "top-k", or "top-k at 40%" where the other
    is.
    """
    measured = set(zip(rows.rule, rows.level, strict=True))
    found = []
    for name in names:
        absent = [level for level in levels if (name, level) not in measured]
        if len(absent) == len(levels):
            found.append(name)
        else:
            found += [f"{name} at {level:.0%}" for level in absent]
    return found


def losses(texts: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """`placed` rows of the first text of each record, by the model's name; `texts`: rows of `perplexity`."""
    frames = {}
    for name, part in texts.groupby("record", sort=False) if len(texts) else ():
        first = part[part.unit == "token"]
        first = first[first.corpus == first.corpus.iloc[0]]
        frames[recorded.model_name(name.removeprefix("rivals-"))] = placed(first)
    return frames


def summary(tasks: pd.DataFrame, texts: pd.DataFrame) -> pd.DataFrame:
    """A row for each rule of one model, best first: rule, and for each level the difference to dense of the
    mean accuracy ("points at 25% [95 %]") and of the loss ("nats at 25%", over the first text there is).

    `tasks`, `texts`: rows of `zero_shot`, of which the average of the eight is taken, and of `perplexity`.
    """
    parts = []
    if len(tasks):
        mean = averages(tasks)
        shown = [
            f"{-row.lost:+.2f}"
            if pd.isna(row.delta_low)  # too few documents for an interval
            else f"{-row.lost:+.2f} [{100 * row.delta_low:+.2f}, {100 * row.delta_high:+.2f}]"
            for row in mean.itertuples()
        ]
        parts.append(_wide(mean.assign(points=shown), "points", " [95 %]"))
    if len(texts):
        text = texts[texts.unit == "token"]
        text = text[text.corpus == text.corpus.iloc[0]]
        parts.append(_wide(placed(text).rename(columns={"lost": "nats"}), "nats"))
    return pd.concat(parts, axis=1).reset_index(names="rule")


def headline(rows: pd.DataFrame, unit: str = "points") -> str:
    """A sentence on rows of `placed` or `averages`: at each level, what CATS and the best rule lose."""
    digits = 1 if unit == "points" else 3
    said = []
    for level, part in reached(rows).groupby("level"):
        best, own = part.iloc[0], part[part.rule == "cats"]
        first = f"{best.rule}, the best of {len(part)} rules,"
        if best.rule == "cats" or own.empty:
            said.append(f"at {level:.0%} {first} loses {best.lost:.{digits}f} {unit}")
        else:
            lost = f"{own.lost.iloc[0]:.{digits}f} {unit}"
            said.append(f"at {level:.0%} CATS loses {lost}, {first} {best.lost:.{digits}f}")
    return f"{'; '.join(said)}."


def widest(points: pd.DataFrame) -> str:
    """A sentence on rows of `averages`: how wide the paired intervals are at the lowest level."""
    low = points[points.level == points.level.min()]
    half = 50 * (low.delta_high - low.delta_low).astype(float)
    return (
        f"At {low.level.iloc[0]:.0%} the widest 95 % interval is ± {half.max():.1f} points, that of "
        f"{low.rule[half.idxmax()]}."
    )


def duel(rows: pd.DataFrame, one: str = "teal", other: str = "cats") -> str:
    """A sentence: which of two rules loses less at the highest level that both have; `rows` as `placed`."""
    names = {name: criteria.rule(name).title for name in (one, other)}
    losses = {name: rows[rows.rule == name].set_index("level").lost for name in names}
    shared = losses[one].index.intersection(losses[other].index)
    if shared.empty:
        return f"{names[one]} and {names[other]} were not both measured here."
    a, b = (losses[name][shared.max()] for name in names)
    less = "less" if a < b else "more"
    return (
        f"{names[one]} at {shared.max():.0%} adds {a:.3f} nats and {names[other]} {b:.3f}: "
        f"{names[one]} loses {less}."
    )


def _beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
    return other != point and other[0] <= point[0] and other[1] <= point[1]


def _levels(rows: pd.DataFrame) -> pd.Series:
    return rows.model_sparsity.astype(float).round(4)


def _wide(rows: pd.DataFrame, value: str, unit: str = "") -> pd.DataFrame:
    """A row for each rule, in the order of the rows; a column for each level."""
    columns = [f"{value} at {level:.0%}{unit}" for level in rows.level]
    wide = rows.assign(column=columns).pivot(index="rule", columns="column", values=value)
    return wide.loc[rows.rule.unique(), list(dict.fromkeys(columns))]

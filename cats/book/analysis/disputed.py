"""The sweep over choices that papers make silently: a column for each choice, from records or live rows."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cats import criteria
from cats.book.analysis import recorded
from cats.book.analysis.anova import Analysis
from cats.criteria.masking import Policy
from cats.evaluation.table import AVERAGE

CHOICES = ("sparsity", "tokens masked", "calibration text", "padding", "allocation")
LOSS, ACCURACY = "loss − dense, nats", "accuracy − dense, points"
EXPLAINED, OF_DISTANCE = "choices and pairs explain", "of it by these"
ALL, NONE = "all", "none of the prompt"


def tokens_masked(policy: dict) -> str:
    """A policy of `cats.masking.Policy`, in the words of figures."""
    if policy["prefill"] == "dense":
        return NONE
    part = "" if policy["last_share"] == 1 else f"last {policy['last_share']:.0%}"
    if policy["first_token"] == "masked":
        return part or ALL
    return f"{part}, not the first" if part else "all but the first"


def label(rows: pd.DataFrame, calibration: dict) -> pd.DataFrame:
    """The sparse rows of `cats.results_table` or a record, with a column for each of CHOICES.

    `calibration` as `cats.method.Calibration.describe` gives it. Sparsity is the model-level target.
    """
    sparse = rows[rows.rule != criteria.DENSE]
    return sparse.assign(
        **{
            "sparsity": [f"{value:.0%}" for value in sparse.model_sparsity],
            "tokens masked": [tokens_masked(policy) for policy in sparse.policy],
            "calibration text": calibration["corpus"],
            "padding": calibration.get("padding", "excluded"),
            "allocation": ["by layer" if rule == "allocated" else "uniform" for rule in sparse.rule],
        }
    )


def sweep(slugs: Sequence[str]) -> pd.DataFrame:
    """One row for each setting that the records named by `slugs` hold: CHOICES, LOSS and ACCURACY.

    LOSS is over the held-out text, ACCURACY the plain mean over the tasks of the difference to dense; missing
    where there is no record of it. Empty where there is none at all.
    """
    parts = {LOSS: _recorded("perplexity", slugs), ACCURACY: _recorded("zero_shot", slugs)}
    columns = []
    if len(parts[LOSS]):
        columns.append(parts[LOSS].groupby([*CHOICES], sort=False).delta_nll.mean().rename(LOSS))
    if len(parts[ACCURACY]):
        tasks = parts[ACCURACY][parts[ACCURACY].task != AVERAGE]
        mean = tasks.groupby([*CHOICES], sort=False).delta_acc.mean()
        columns.append(mean.mul(100).rename(ACCURACY))
    return pd.concat(columns, axis=1).reset_index() if columns else pd.DataFrame()


def slugs(model: str) -> list[str]:
    """The records of the sweep of one model, as data/plans/disputes.yml names them."""
    return [f"disputes-{model}-{text}{padding}" for text in ("docs", "plays") for padding in ("", "-padding")]


def policies(names: Sequence[str]) -> list[Policy]:
    """Policies by the words of `tokens_masked`: "all", "all but the first", "last 50%" and so on."""
    known = {
        tokens_masked(policy.describe()): policy
        for share in (1.0, 0.99, 0.5, 0.1)
        for first in ("masked", "dense")
        for policy in [Policy(first_token=first, last_share=share)]
    }
    known[NONE] = Policy(prefill="dense")
    return [known[name] for name in names]


def summary(analyses: Mapping[str, Analysis]) -> pd.DataFrame:
    """A row a sweep: what explains most, how much choices and pairs of them explain, the two settings
    furthest apart, and how much of that distance choices and pairs make up.
    """
    rows = []
    for name, analysis in analyses.items():
        first = analysis.table.iloc[0]
        gap, share = analysis.spread()
        low, high = (", ".join(place.values()) for place in analysis.extremes())
        rows.append(
            {
                "sweep": name,
                "explains most": f"{first.effect}, {first.share:.0%}",
                EXPLAINED: analysis.explained(),
                "lowest": low,
                "highest": high,
                "apart": gap,
                OF_DISTANCE: share,
            }
        )
    return pd.DataFrame(rows)


def moves(name: str, analysis: Analysis) -> pd.DataFrame:
    """A row for each choice of a sweep: sweep, choice, moves (how far its levels' means are apart), kept (the
    level of least loss or highest accuracy) and share (of the variation, by itself).
    """
    shares = analysis.table.set_index("effect").share
    sign = -1 if analysis.response == ACCURACY else 1
    rows = []
    for factor in analysis.factors:
        means = analysis.means(factor)
        rows.append(
            {
                "sweep": name,
                "choice": factor,
                "moves": float(means["mean"].max() - means["mean"].min()),
                "kept": means.level[(sign * means["mean"]).idxmin()],
                "share": shares[factor],
            }
        )
    return pd.DataFrame(rows)


def concentrated(rows: pd.DataFrame) -> dict[str, str]:
    """Whether fewer tokens masked harder cost more than all of them masked less, as a sentence of a chapter.

    `rows` of `label` with LOSS: the setting of fewest realised weights at the highest sparsity beside
    that of all tokens at the lowest, means over whatever else varies.
    """
    mean = rows.groupby(["sparsity", "tokens masked"])[["realised_model_sparsity", LOSS]].mean()
    levels = sorted(rows.sparsity.unique(), key=lambda level: float(level.rstrip("%")))
    hard = mean.loc[levels[-1]].sort_values("realised_model_sparsity").iloc[0]
    even = mean.loc[levels[0]].loc[ALL] if ALL in mean.loc[levels[0]].index else None
    if even is None or hard.name == ALL or len(levels) < 2:
        return {"disputed_concentrated": "the sweep has no setting that would show it."}
    return {
        "disputed_concentrated": (
            f"{hard.name} at {levels[-1]} does without {hard.realised_model_sparsity:.1%} of the weights and "
            f"loses {hard[LOSS]:.2f} nats, all tokens at {levels[0]} do without "
            f"{even.realised_model_sparsity:.1%} and lose {even[LOSS]:.2f}."
        )
    }


def _recorded(experiment: str, names: Sequence[str]) -> pd.DataFrame:
    held = [record for name in names if (record := recorded.find(experiment, name)) is not None]
    parts = [label(record.rows, record.content["parameters"]["calibration"]) for record in held]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

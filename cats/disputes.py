"""The sweep over choices that papers make silently: a column for each choice, from records or live rows."""

from collections.abc import Sequence

import pandas as pd

from cats import criteria, recorded, results
from cats.masking import Policy
from cats.variance import Analysis

CHOICES = ("sparsity", "tokens masked", "calibration text", "padding", "allocation")
LOSS, ACCURACY = "loss − dense, nats", "accuracy − dense, points"
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
    """The sparse rows of `cats.results.table` or a record, with a column for each of CHOICES.

    `calibration` as `cats.configuration.Calibration.describe` gives it. Sparsity is the model-level target.
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
        tasks = parts[ACCURACY][parts[ACCURACY].task != results.AVERAGE]
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


def told(name: str, analysis: Analysis) -> str:
    """What an analysis of the sweep says of the spread, in two sentences that begin with `name`."""
    first = analysis.table.iloc[0]
    gap, share = analysis.spread()
    low, high = (", ".join(place.values()) for place in analysis.extremes())
    return (
        f"{name}: {first.effect} explains most, {first.share:.0%} of the variation; single choices and pairs "
        f"together explain {analysis.explained():.1%}. Lowest is ({low}), highest ({high}), {gap:.2f} apart; "
        f"single choices and pairs make up {share:.1%} of that distance."
    )


def _recorded(experiment: str, names: Sequence[str]) -> pd.DataFrame:
    held = [record for name in names if (record := recorded.find(experiment, name)) is not None]
    parts = [label(record.rows, record.content["parameters"]["calibration"]) for record in held]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

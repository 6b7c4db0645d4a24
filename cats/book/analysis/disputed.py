"""The sweep over choices that papers make silently: a column for each choice, from records or live rows."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cats import criteria
from cats.book.analysis import recorded
from cats.book.analysis.anova import Analysis, analyse
from cats.book.box import Box
from cats.book.html_table import Table
from cats.book.words import listed
from cats.core.accounting import account
from cats.criteria.masking import Policy
from cats.evaluation.table import AVERAGE
from cats.models import load as models
from cats.records import paper

CHOICES = ("sparsity", "tokens masked", "calibration text", "padding", "allocation")
LOSS, ACCURACY = "loss − dense, nats", "accuracy − dense, points"
EXPLAINED, OF_DISTANCE = "choices and pairs explain", "of it by these"
ALL, NONE = "all", "none of the prompt"
_AVERAGES = ("average", "average of 7", "average of 8")
# Which tokens of a prompt each paper's released code masks for its own method, by default.
_MASKED = {"R-Sparse": "last 10%", "LaRoSA": "all", "WINA": "last 99%", "TEAL": "last 50%"}


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


def box(sweeps: Mapping[str, tuple], level: str) -> Box:
    """The chapter in a box: what moves each recorded result most where the target is fixed at `level`.

    `sweeps`: name -> (rows, response, factors), the first of which is the sparsity.
    """
    gates = gate_sparsities().round(2)
    parts = []
    for name, (rows, response, (_, *rest)) in sweeps.items():
        if response == ACCURACY:
            first = moves(name, analyse(rows[rows.sparsity == level], response, rest)).sort_values("share")
            row = first.iloc[-1]
            model = recorded.model_name(name.split(", ")[0])
            parts.append(f"{row.choice} on {model} ({row.moves:.2f} points, {row.share:.0%})")
    moved = f" What moves the mean accuracy most at that target is {listed(parts)}." if parts else ""
    return Box(
        "Why has the same method incompatible numbers in print?",
        f"{level} of linear weights is a gate sparsity of {gates.min():.0%} to {gates.max():.0%} by model."
        f"{moved} In brackets: how far apart the levels' means are, and the share of the variation.",
        "fig-variance",
        "The sweep crosses choices on three small models; which choice a given paper made is not known here. "
        "Accuracy is of 100 questions a task, so part of its variation is chance.",
        "cats evaluate --plan data/plans/disputes.yml --data-dir MIRRORS --output runs",
    )


def gate_sparsities(target: float = 0.4) -> pd.Series:
    """The gate sparsity that `target` of all linear weights takes, by row of `printed_rows`."""
    rows = printed_rows()
    shapes = {name: account(models.config(f"random:{name.lower()}")) for name in rows.model.unique()}
    return rows.model.map(lambda name: shapes[name].gate_sparsity(target))


def printed_rows() -> pd.DataFrame:
    """The averages and perplexities of CATS at 40 % that later papers print."""
    rows = paper.table("later_papers")
    rows = rows[(rows.method == "CATS") & (rows.model_sparsity == 0.4)]
    return rows[rows.task.isin(_AVERAGES) | (rows.quantity == "perplexity")]


def printed() -> Table:
    """The printed values with the gate sparsity they take, and what each paper's code masks by default."""
    rows = printed_rows()
    source = rows.source.str.split(",").str[0]
    frame = pd.DataFrame(
        {
            "source": source,
            "model": rows.model,
            "gate sparsity": gate_sparsities(),
            "what": rows.task.where(rows.task.isin(_AVERAGES), "perplexity"),
            "value": rows.value,
            "its own code masks": source.map(_MASKED),
        }
    )
    formats = {"gate sparsity": "{:.0%}", "value": "{:,.2f}"}
    return Table(frame, formats, caption='"CATS at 40%" in later papers')


def live_table(rows: pd.DataFrame, varied: Sequence[str]) -> Table:
    """Every setting of the live sweep: what was realised and what it costs."""
    frame = rows[[*varied, "realised_model_sparsity", LOSS]]
    frame = frame.rename(columns={"realised_model_sparsity": "realised"})
    return Table(frame, {"realised": "{:.1%}", LOSS: "{:+.3f}"}, caption="Live: every setting of the sweep")


def summary_table(analyses: Mapping[str, Analysis]) -> Table:
    """`summary` as a table: loss in nats over dense, accuracy in points over dense."""
    formats = {EXPLAINED: "{:.1%}", "apart": "{:.2f}", OF_DISTANCE: "{:.1%}"}
    return Table(summary(analyses), formats, caption="What explains the variation of each sweep")


def moves_table(moved: pd.DataFrame, sweeps: Sequence[str]) -> Table:
    """Rows of `moves`, a line a sweep a column a choice: distance, share, and the level of least loss."""
    cells = [f"{row.moves:.2f} ({row.share:.0%}), {row.kept}" for row in moved.itertuples()]
    wide = moved.assign(cell=cells).pivot(index="sweep", columns="choice", values="cell")
    wide = wide.loc[list(sweeps), [choice for choice in CHOICES if choice in wide]]
    return Table(
        wide.reset_index(), caption="How far apart each choice moves the mean where the target is fixed"
    )


def rows_table(slugs: Sequence[str], counts: Sequence[int]) -> tuple[Table | None, str]:
    """Loss over dense by the number of calibration rows, and what that comes to in a sentence.

    `slugs` name the records in the order of `counts`, fewest first. The sentence has the change from the
    fewest to the most, and the widest between any two.
    """
    found = recorded.rows("perplexity", slugs)
    if not len(found) or found.record.nunique() < 2:
        return None, "What their number does to the loss is not measured yet."
    sparse = found[found.rule != "dense"]
    column = [f"{row.rule} at {row.model_sparsity:.0%}" for row in sparse.itertuples()]
    number = sparse.record.map(dict(zip(slugs, counts, strict=True)))
    wide = sparse.assign(rows=number, column=column).pivot_table(
        index="rows", columns="column", values="delta_nll"
    )
    ends = float((wide.iloc[-1] - wide.iloc[0]).abs().max())
    widest = float((wide.max() - wide.min()).max())
    said = (
        f"From {wide.index[0]} to {wide.index[-1]:,} rows the loss moves by {ends:.3f} nats at most, and "
        f"between any two of these numbers by {widest:.3f}."
    )
    table = wide.reset_index(names="rows of calibration text")
    formats = dict.fromkeys(wide.columns, "{:+.4f}")
    return Table(table, formats, caption="Loss over dense in nats, by rows of calibration text"), said


def _recorded(experiment: str, names: Sequence[str]) -> pd.DataFrame:
    present = [record for name in names if (record := recorded.find(experiment, name)) is not None]
    parts = [label(record.rows, record.content["parameters"]["calibration"]) for record in present]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

"""Tables of the chapter on rivals: rules and kernels, live losses, geometries, GSM8K, later papers."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cats import criteria
from cats.book.analysis import recorded, rivals
from cats.book.box import Box
from cats.book.html_table import Table
from cats.book.words import interval
from cats.core.accounting import account
from cats.models import load as models
from cats.records import paper

_GEOMETRIES = ("llama-2-7b", "llama-2-13b", "mistral-7b", "qwen2.5-7b")


def box(points: Mapping[str, pd.DataFrame]) -> Box:
    """The chapter in a box; `points`: model -> rows of `rivals.averages`, the first with intervals."""
    answer = "No rule is recorded on the eight tasks yet."
    if points:
        name, rows = next(iter(points.items()))
        rows = rivals.reached(rows)
        rows = rows[rows.level == rows.level.max()]
        parts = []
        for rule in dict.fromkeys(["cats", rows.iloc[0].rule, "teal"]):
            row = rows[rows.rule == rule].iloc[0]
            change = interval(row.delta_acc, row.delta_low, row.delta_high, digits=1, scale=100)
            parts.append(f"{criteria.rule(rule).title} {change}")
        answer = (
            f"On {recorded.model_name(name)} with {rows.level.iloc[0]:.0%} of all linear weights unread, the "
            f"mean accuracy of eight tasks changes by these points, with 95% intervals: {'; '.join(parts)}. "
            f"The rule that loses least of {len(rows)} is {criteria.rule(rows.iloc[0].rule).title}."
        )
    return Box(
        "At the same bytes, does CATS keep more than the rules of later papers?",
        answer,
        "fig-rivals-points",
        "Bytes that a rule could leave unread save no time without a kernel, and few of the rules have one.",
        "cats evaluate --plan data/plans/rivals.yml --data-dir MIRRORS --output runs",
    )


def rules(names: Sequence[str]) -> Table:
    """What each rule drops, and which kernel decodes with it."""
    lines = [
        {
            "rule": f"{criteria.rule(name).title}\n{name}",
            "drops": rivals.family(name),
            "kernel that decodes with it": rivals.kernel(name),
        }
        for name in dict.fromkeys(names)
    ]
    return Table(pd.DataFrame(lines), caption="Each rule, what it drops, and its kernel")


def live(rows: pd.DataFrame) -> Table:
    """Rows of `rivals.placed`: what was realised, and the loss with its paired interval."""
    frame = pd.DataFrame(
        {
            "rule": rows.rule,
            "target": rows.level,
            "realised": rows.realised_model_sparsity,
            "MB a token": rows.megabytes,
            "loss": rows.nll_nats,
            "loss − dense [95%]": [
                interval(row.delta_nll, row.delta_low, row.delta_high) for row in rows.itertuples()
            ],
        }
    )
    formats = {"target": "{:.0%}", "realised": "{:.1%}", "MB a token": "{:.0f}", "loss": "{:.3f}"}
    return Table(frame, formats, caption="Live: loss in nats at the same bytes")


def geometries(own, name: str, levels: Sequence[float]) -> Table:
    """The gate sparsity of CATS that a target of all linear weights takes; `own`: the config of one more."""
    shapes = {geometry: account(models.config(f"random:{geometry}")) for geometry in _GEOMETRIES}
    shapes[name] = account(own)
    lines = []
    for model, shape in shapes.items():
        reach = shape.max_model_sparsity
        gates = {
            f"gate sparsity for {level:.0%}": shape.gate_sparsity(level) if level < reach else None
            for level in levels
        }
        half = shape.model_sparsity(0.5)
        lines.append({"model": model, "reach of CATS": reach, **gates, "CATS 50% is": half})
    frame = pd.DataFrame(lines)
    caption = "Model-level sparsity and the gate sparsity of CATS that it takes"
    return Table(frame, dict.fromkeys(frame.columns[1:], "{:.1%}"), caption=caption)


def summary(tasks: pd.DataFrame, texts: pd.DataFrame, model: str) -> Table:
    """`rivals.summary` of one model as a table."""
    frame = rivals.summary(tasks, texts)
    nats = [column for column in frame.columns if "nats" in column]
    caption = f"{recorded.model_name(model)}: difference to dense, best rule first"
    return Table(frame, dict.fromkeys(nats, "{:+.3f}"), caption=recorded.quality(caption, tasks))


def maths(rows: pd.DataFrame) -> Table | None:
    """GSM8K by rule, without the speed of the evaluation; None where nothing is recorded."""
    if not len(rows):
        return None
    columns = {
        "rule": ("rule", "{}"),
        "gate_sparsity": ("gate", "{:.0%}"),
        "model_sparsity": ("model-level", "{:.1%}"),
        "documents": ("problems", "{:.0f}"),
        "exact_match": ("exact match", "{:.3f}"),
        "exact_match_se": ("± se", "{:.3f}"),
        "delta": ("− dense", "{:+.3f}"),
        "dense_steps_per_token": ("dense steps a token", "{:.3f}"),
    }
    frame = rows.reindex(columns=list(columns)).rename(columns={k: name for k, (name, _) in columns.items()})
    caption = f"GSM8K on {rows.model.iloc[0]}; {rows.documents.iloc[0]:.0f} of the 1,319 problems"
    return Table(frame, dict(columns.values()), caption=recorded.quality(caption, rows))


def printed() -> Table:
    """Mean accuracies in per cent that later papers print, by model-level sparsity."""
    rows = paper.table("later_papers")
    rows = rows[rows.model_sparsity.notna() & rows.value.notna() & (rows.model_sparsity <= 0.5)]
    wina = rows["item"].str.startswith("WINA") & (rows.task == "average of 8")
    rows = rows[wina | rows.task.isin(["average", "average of 7"])]
    level = [f"{value:.0%}" if value else "dense" for value in rows.model_sparsity]
    rows = rows.assign(paper=rows.source.str.split(",").str[0], level=level)
    dense = rows[rows.level == "dense"].set_index(["paper", "model"]).value
    keys = ["paper", "model", "method"]
    wide = rows[rows.level != "dense"].pivot_table(index=keys, columns="level", values="value", sort=False)
    wide = wide[sorted(wide.columns)].reset_index()
    wide.insert(3, "dense", [dense[key] for key in zip(wide.paper, wide.model, strict=True)])
    caption = "Mean accuracies in per cent that later papers print"
    return Table(wide, dict.fromkeys(wide.columns[3:], "{:.2f}"), caption=caption)


def reports(points: Mapping[str, pd.DataFrame]) -> str:
    """What the records say of CATS and of the best rule, a sentence each model."""
    found = [f"on {recorded.model_name(name)}, {rivals.headline(rows)}" for name, rows in points.items()]
    return f"On the eight tasks of the paper, {' And '.join(found)}" if found else "Nothing is recorded yet."


def gaps(
    points: Mapping[str, pd.DataFrame], wanted: Sequence[str], rules: Sequence[str], levels: Sequence[float]
) -> str:
    """What of `rules` at `levels` is in no record of the models `wanted`, as a sentence or nothing."""
    ends = []
    for name in wanted:
        absent = rivals.missing(points[name], rules, levels) if name in points else ["all of them"]
        if absent:
            ends.append(f"on {recorded.model_name(name)}: {', '.join(absent)}")
    return f"Not in these records, {'; '.join(ends)}." if ends else ""

"""Rules of equal bytes, live and from records, and the same evaluation run twice."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cats import criteria
from cats.book.analysis import equal_bytes, recorded
from cats.book.box import Box
from cats.book.html_table import Table
from cats.book.words import interval, listed
from cats.evaluation.intervals import as_text, difference
from cats.records import record as records
from cats.records.packing import unpack

_CORRECT = ("correct", "correct_again")


def box(rows: pd.DataFrame, rules: Sequence[str], target: float = 0.7) -> Box:
    """The chapter in a box: `rules` of one model at equal bytes; `rows` of its zero_shot record."""
    found = equal_bytes.compare(rows, rules, target, by="gate_sparsity") if len(rows) else None
    answer = "No run of these rules on the full test sets is recorded."
    if found is not None:
        lines = found.lines.set_index("rule")
        change = interval(*lines.loc["cats", ["delta", "low", "high"]], digits=1, scale=100)
        answer = (
            f"{equal_bytes.words(found)} CATS there changes the mean accuracy of eight tasks by {change} "
            "points, with a 95% interval."
        )
    return Box(
        "Which mask of the same bytes keeps most?",
        answer,
        "fig-variants",
        "Small models read back from 4 bits. `centred` needs memory for one more matrix, and its kernel "
        "takes one token at a time. The ridge of the fitted rules was chosen before a development split was "
        "fixed.",
        "cats evaluate --plan data/plans/three-models.yml --data-dir MIRRORS --output runs",
    )


def rules_table(names: Sequence[str]) -> Table:
    """What each rule does."""
    lines = [{"rule": name, "what it does": criteria.rule(name).what.replace("`", "")} for name in names]
    return Table(pd.DataFrame(lines), caption="The rules: masks of the same number of neurons")


def at_equal_bytes(slug: str, rules: Sequence[str]) -> tuple[list[Table], list[str]]:
    """For each gate sparsity of a zero_shot record, `rules` at equal bytes: a table, and a sentence."""
    rows = recorded.rows("zero_shot", [slug])
    levels = sorted({each for each in rows.gate_sparsity.dropna() if each > 0}) if len(rows) else []
    found = [equal_bytes.compare(rows, rules, level, by="gate_sparsity") for level in levels]
    found = [each for each in found if each is not None]
    return [equal_bytes.table(each, rows) for each in found], [equal_bytes.words(each) for each in found]


def loss_table(rows: pd.DataFrame, rules: Sequence[str]) -> Table:
    """Losses of one model's perplexity record at equal bytes."""
    frame = equal_bytes.losses(rows, rules)
    name = recorded.spelled(rows.model.iloc[0])
    documents = dict(zip(rows.corpus, rows.documents, strict=True))
    caption = (
        f"{name}: loss over dense in nats at equal bytes, those of the rule that reads most at a target "
        f"({listed([f'{count} documents of {corpus}' for corpus, count in documents.items()])})"
    )
    return Table(frame, dict.fromkeys(frame.columns[1:], "{:+.3f}"), caption=recorded.quality(caption, rows))


def panels(rows: pd.DataFrame, rules: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Model -> the losses of `rules` on the first text of its record, for `plots.zero_shot.losses`."""
    rows = rows[rows.rule.isin(list(rules)) & rows.delta_nll.notna()]
    return {
        recorded.model_name(name.removeprefix("rules-")): part[part.corpus == part.corpus.iloc[0]]
        for name, part in rows.groupby("record", sort=False)
    }


def live_table(rows: pd.DataFrame) -> Table:
    """Sparse rows of this page: what was realised, the bytes that follow, and the paired loss."""
    frame = pd.DataFrame(
        {
            "rule": rows.rule,
            "target": rows.gate_sparsity,
            "realised": rows.realised_sparsity,
            "MB a token": rows.realised_bytes_per_token / 1e6,
            "loss − dense [95%]": [
                interval(row.delta_nll, row.delta_low, row.delta_high) for row in rows.itertuples()
            ],
        }
    )
    formats = {"target": "{:.0%}", "realised": "{:.1%}", "MB a token": "{:.1f}"}
    caption = f"Live: loss in nats over {rows.tokens.iloc[0]} tokens of {rows.documents.iloc[0]} documents"
    return Table(frame, formats, caption=caption)


def other_tasks(slug: str, rules: Sequence[str]) -> Table | None:
    """LAMBADA, GSM8K and texts of the records of one model, at equal targets; None without records."""
    tasks = recorded.rows("zero_shot", [slug])
    if not len(tasks):
        return None
    maths, losses = recorded.rows("generation", [f"{slug}-gsm8k"]), recorded.rows("perplexity", [slug])
    frame = tasks_frame(tasks, maths, losses, rules)
    formats = dict.fromkeys(["LAMBADA", "GSM8K"], "{:.1%}")
    formats |= dict.fromkeys(frame.filter(like="nats"), "{:+.3f}")
    caption = f"{recorded.model_name(slug)}: LAMBADA, GSM8K and the rise of the loss at the same targets"
    shown = {name: form for name, form in formats.items() if name in frame}
    return Table(frame, shown, caption=recorded.quality(caption, tasks[tasks.task == "lambada_openai"]))


def tasks_frame(
    tasks: pd.DataFrame, maths: pd.DataFrame, losses: pd.DataFrame, rules: Sequence[str]
) -> pd.DataFrame:
    """A line for each of `rules` and each gate sparsity.

    `tasks`, `maths`, `losses`: rows of one model's zero_shot, generation and perplexity records, one
    calibration; the last two may be empty. Differences to CATS are in points, with 95 % intervals, on the
    same documents. Columns that no rule has a value in are left out.
    """
    table = []
    for level in sorted({s for s in tasks[tasks.rule != "cats"].gate_sparsity.dropna() if s > 0}):
        for rule in rules:
            row = {
                "": f"{rule} {level:.0%}",
                "LAMBADA": _at(tasks, rule, level, "acc", task="lambada_openai"),
                "GSM8K": _at(maths, rule, level, "exact_match"),
                "GSM8K − CATS, points": None,
            }
            if row["LAMBADA"] is None:
                continue
            for corpus in dict.fromkeys(losses.corpus) if len(losses) else ():
                row[f"{corpus}, nats"] = _at(losses, rule, level, "delta_nll", corpus=corpus)
            both = [_at(maths, each, level, "correct") for each in ("cats", rule)]
            if rule != "cats" and None not in both:
                row["GSM8K − CATS, points"] = _points(difference(*map(unpack, both)))
            table.append(row)
    return pd.DataFrame(table).dropna(axis=1, how="all")


def speed_table(rows: pd.DataFrame) -> Table | None:
    """CATS and `centred` in a CUDA graph, over the best dense MLP of their run; rows of mlp_latency."""
    if not len(rows):
        return None
    rows = rows[(rows.launch == "graph") & (rows.sparsity > 0)]
    rows = rows.assign(MLP=[f"{row.hidden_size} × {row.intermediate_size}" for row in rows.itertuples()])
    values = ["latency_us", "speedup_over_best_dense"]
    wide = rows.pivot_table(index=["MLP", "sparsity"], columns="variant", values=values, sort=False)
    columns = {
        f"{title}, {unit}": wide[value][variant]
        for variant, title in (("cats", "CATS"), ("centred", "centred"))
        for value, unit in zip(values, ("µs", "× dense"), strict=True)
    }
    formats = {name: "{:.1f}" if "µs" in name else "{:.2f}" for name in columns}
    caption = "One token, CUDA graph, random weights: time of the MLP, and the best dense time over it"
    return Table(pd.DataFrame(columns).reset_index(), {"sparsity": "{:.0%}", **formats}, caption=caption)


def again(one: records.Record, other: records.Record) -> pd.DataFrame:
    """Configurations that two records of one model's tasks share: method, gate_sparsity, answers, how many of
    them changed, and the accuracy over all of them in the first (acc) and the second (acc_again).

    A task is shared where both have as many of its documents, a sparse configuration where both were
    calibrated alike.
    """
    texts = [record.content["parameters"].get("calibration") for record in (one, other)]
    keys = ["method", "gate_sparsity", "task", "documents"]
    both = one.rows.merge(other.rows, on=keys, suffixes=("", "_again"))
    both = both[both.correct.notna() & ((texts[0] == texts[1]) | (both.rule == "dense"))]
    rows = []
    for (method, level), part in both.groupby(keys[:2], sort=False):
        first, second = (np.concatenate([unpack(each) for each in part[name]]) for name in _CORRECT)
        rows.append((method, level, len(first), int((first != second).sum()), first.mean(), second.mean()))
    return pd.DataFrame(rows, columns=[*keys[:2], "answers", "changed", "acc", "acc_again"])


def _at(rows: pd.DataFrame, rule: str, level: float, column: str, **where):
    """One value of a table, None where it is not there."""
    if not len(rows) or column not in rows:
        return None
    found = rows[(rows.rule == rule) & (rows.gate_sparsity == level)]
    for name, value in where.items():
        found = found[found[name] == value]
    return found[column].iloc[0] if len(found) else None


def _points(found: dict) -> str:
    return as_text(found["delta"], found["low"], found["high"], "+.1f", scale=100)

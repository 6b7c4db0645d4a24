"""Rules of equal bytes on recorded tasks: each beside CATS on the same questions, and runs told again."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cats.evaluation.intervals import as_text, difference, mean_difference
from cats.evaluation.table import AVERAGE
from cats.evaluation.task_list import PAPER, stock
from cats.records import record as records
from cats.records.packing import unpack

_CORRECT = ("correct", "correct_again")


def between(rows: pd.DataFrame, baseline: str, rule: str, sparsity: float) -> dict | None:
    """`rule` minus `baseline` at one gate sparsity: mean accuracy of the paper's tasks, same documents.

    `rows`: of one zero_shot record. delta, low, high as `cats.pairs.mean_difference`; None unless the record
    has all tasks under both rules.
    """
    rows = rows[rows.gate_sparsity == sparsity]
    tasks = rows.task.map(stock)
    pairs = []
    for name in PAPER:
        both = [rows[(tasks == name) & (rows.rule == each)].correct.dropna() for each in (baseline, rule)]
        if not all(map(len, both)):
            return None
        pairs.append(tuple(unpack(scores.iloc[0]) for scores in both))
    return mean_difference(pairs)


def variants(
    tasks: pd.DataFrame, maths: pd.DataFrame, losses: pd.DataFrame, rules: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """A table of `rules` at equal gate sparsity, and for each sparsity a clause on the best average.

    `tasks`, `maths`, `losses`: rows of one model's zero_shot, generation and perplexity records, one
    calibration; the last two may be empty. Differences to CATS are in points, with 95 % intervals, on the
    same documents. Columns that no rule has a value in are left out.
    """
    table, words = [], []
    for level in sorted({s for s in tasks[tasks.rule != "cats"].gate_sparsity.dropna() if s > 0}):
        rows = {}
        for rule in rules:
            row = {
                "": f"{rule} {level:.0%}",
                "of the dense average": _at(tasks, rule, level, "share_of_dense", task=AVERAGE),
                "average − CATS, points": None,
                "LAMBADA": _at(tasks, rule, level, "acc", task="lambada_openai"),
                "GSM8K": _at(maths, rule, level, "exact_match"),
                "GSM8K − CATS, points": None,
            }
            for corpus in dict.fromkeys(losses.corpus) if len(losses) else ():
                row[f"{corpus}, nats"] = _at(losses, rule, level, "delta_nll", corpus=corpus)
            if row["of the dense average"] is None:
                continue
            rows[rule] = row
            gain = between(tasks, "cats", rule, level)
            if rule == "cats" or gain is None:
                continue
            row["average − CATS, points"] = _points(gain)
            both = [_at(maths, each, level, "correct") for each in ("cats", rule)]
            if None not in both:
                row["GSM8K − CATS, points"] = _points(difference(*map(unpack, both)))
        table += rows.values()
        if rows:
            name, best = max(rows.items(), key=lambda each: each[1]["of the dense average"])
            share = best["of the dense average"]
            solved = "" if best["GSM8K"] is None else f" and solves {best['GSM8K']:.1%} of GSM8K"
            words.append(f"at {level:.0%} {name} keeps most, {share:.1%} of the dense average{solved}")
    return pd.DataFrame(table).dropna(axis=1, how="all"), words


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

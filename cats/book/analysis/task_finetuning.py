"""Fine-tuning on one task: which checkpoint is kept, and what full-size runs end with."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cats.book.analysis import recorded
from cats.book.box import Box
from cats.book.html_table import Table
from cats.book.plots.finetuning import title
from cats.book.words import interval, listed
from cats.finetuning import Recipe, table

LEARNED = 0.65  # accuracy of the dense model above which a task of two answers was learned
_METHODS = {
    "dense": {},
    "CATS": {"rule": "cats", "sparsity": 0.5},
    "ReLUfication": {"rule": "relufication"},
}


def accuracy_at(rows: pd.DataFrame, step: int) -> float:
    """The test accuracy of a curve at a step."""
    return float(rows[rows.step == step].accuracy.iloc[0])


def checkpoints(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a method: before, kept (accuracy of the checkpoint kept), step, delta, low, high to dense at that
    step (None where it was not compared), reference (the one that the reference code keeps), realised.
    """
    found = []
    plain = rows[~rows.method.str.contains("recalibrated")]
    for method, part in plain.groupby("method", sort=False):
        best = part[part.step == table.kept(part)].iloc[0]
        worst = part[part.step == table.kept(part, reference_sign=True)].iloc[0]
        found.append(
            {
                "method": method,
                "before": accuracy_at(part, 0),
                "kept": best.accuracy,
                "step": int(best.step),
                "delta": best.delta_acc,
                "low": best.delta_acc_low,
                "high": best.delta_acc_high,
                "reference": worst.accuracy,
                "realised": best.realised_sparsity,
            }
        )
    return pd.DataFrame(found)


def checkpoints_table(rows: pd.DataFrame, caption: str) -> Table:
    """`checkpoints` of `rows` as a table."""
    found = checkpoints(rows)
    frame = pd.DataFrame(
        {
            "method": found.method.map(title),
            "before": found.before,
            "kept": found.kept,
            "at step": found.step,
            "− dense, same step [95%]": [
                None if pd.isna(row.delta) else interval(row.delta, row.low, row.high)
                for row in found.itertuples()
            ],
            "reference code": found.reference,
            "realised": found.realised,
        }
    )
    formats = dict.fromkeys(("before", "kept", "reference code", "realised"), "{:.1%}")
    return Table(frame, formats, caption=caption)


def dense_ends(slugs: Sequence[str]) -> dict[str, float]:
    """The accuracy that dense training keeps, by task, of the records `finetuning-<task>-<model>`."""
    ends = {}
    for slug in slugs:
        record = recorded.find("finetuning", slug)
        if record is not None and "own-thresholds" not in slug:
            found = checkpoints(record.rows).set_index("method")
            ends[slug.split("-")[0]] = float(found.kept["dense"])
    return ends


def learned(ends: Mapping[str, float]) -> str:
    """On which tasks dense training leaves chance, as a sentence."""
    if not ends:
        return "None of the tasks is measured at full size yet."
    above = [task for task, accuracy in ends.items() if accuracy > LEARNED]
    below = [task for task in ends if task not in above]
    said = f"Dense training ends above {LEARNED:.0%} on {listed(above) or 'none of the tasks'}"
    return f"{said}, and not on {listed(below)}." if below else f"{said}."


def box(slugs: Sequence[str]) -> Box:
    """The chapter in a box, on the first task that dense training learns."""
    ends = dense_ends(slugs)
    answer = learned(ends)
    task = next((task for task, accuracy in ends.items() if accuracy > LEARNED), None)
    if task is not None:
        record = recorded.find("finetuning", next(slug for slug in slugs if slug.startswith(task)))
        found = checkpoints(record.rows)
        row = found[found.method.str.startswith("cats")].iloc[0]
        change = interval(row.delta, row.low, row.high, digits=1, scale=100)
        answer = (
            f"On {task} {title(row.method)} keeps a checkpoint that is right for {row.kept:.1%} of the test "
            f"rows, {change} points from dense at the same step (95% interval). {answer}"
        )
    steps = {int(recorded.find("finetuning", slug).rows.step.max()) for slug in slugs[:1] if ends}
    return Box(
        "Does a model under CATS learn a task as well as the dense one?",
        answer,
        "fig-checkpoints",
        f"SmolLM2-135M, one seed, {max(steps, default=0):,} steps, part of an epoch. The paper's two tables "
        "are not among the values that this book holds, so none are compared.",
        "cats finetune --plan data/plans/finetuning/tasks.yml --device cuda --data-dir MIRRORS",
    )


def thresholds_table(lines: Mapping[str, pd.DataFrame]) -> Table:
    """What each calibration realises on the test rows before training; `lines`: name -> its rows."""
    frame = pd.DataFrame(
        {
            "thresholds": list(lines),
            "realised": [rows.realised_sparsity.iloc[0] for rows in lines.values()],
            "loss on the answer": [rows.heldout_nll_nats.iloc[0] for rows in lines.values()],
            "accuracy": [rows.accuracy.iloc[0] for rows in lines.values()],
        }
    )
    formats = {"realised": "{:.1%}", "loss on the answer": "{:.3f}", "accuracy": "{:.0%}"}
    return Table(frame, formats, caption="Live: thresholds of general text and of the task, before training")


def rows_table() -> Table:
    """Rows that each method reads in a step of a global batch of 16, in the reference code and here."""
    unequal = {name: Recipe(unequal=True, **given) for name, given in _METHODS.items()}
    frame = pd.DataFrame(
        {
            "method": list(_METHODS),
            "general text": [recipe.rows_a_step() for recipe in unequal.values()],
            "BoolQ": [recipe.rows_a_step(instructions=True) for recipe in unequal.values()],
            "here": [Recipe(**given).rows_a_step() for given in _METHODS.values()],
        }
    )
    return Table(frame, caption="Rows a step: the reference code on two kinds of text, and this book")

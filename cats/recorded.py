"""Full-size results in a chapter: the rows of a record where it exists, and words where it does not."""

from collections.abc import Sequence

import pandas as pd

from cats import records
from cats.errors import CatsError
from cats.tables import Table

ABSENT = "not measured yet"


def find(experiment: str, slug: str) -> records.Record | None:
    """The newest record of that name, None where there is none."""
    try:
        return records.read(experiment, slug=slug)
    except CatsError:
        return None


def rows(experiment: str, slugs: Sequence[str]) -> pd.DataFrame:
    """The rows of the records there are, with `record`; empty where none is."""
    found = [(slug, record) for slug in slugs if (record := find(experiment, slug)) is not None]
    if not found:
        return pd.DataFrame()
    return pd.concat([record.rows.assign(record=slug) for slug, record in found], ignore_index=True)


def provenance(experiment: str, slugs: Sequence[str]) -> str:
    """One line for each record, or that it is not measured yet."""
    lines = []
    for slug in slugs:
        record = find(experiment, slug)
        lines.append(f"{experiment}-{slug}: {ABSENT}" if record is None else record.provenance())
    return "\n".join(lines)


def label(row) -> str:
    """Method and gate sparsity, as figures call them."""
    sparsity = row["gate_sparsity"]
    return (
        row["method"]
        if sparsity is None or pd.isna(sparsity) or not sparsity
        else f"{row['method']} {sparsity:.0%}"
    )


def accuracy_table(frame: pd.DataFrame) -> Table:
    """Tasks down, methods across: acc in per cent, and below each task's name nothing but what was
    measured.
    """
    if frame.empty:
        return Table(pd.DataFrame({"": [ABSENT]}))
    frame = frame.assign(label=frame.apply(label, axis=1))
    order, tasks = list(dict.fromkeys(frame.label)), list(dict.fromkeys(frame.task))
    wide = frame.pivot_table(index="task", columns="label", values="acc", aggfunc="first").reindex(tasks)[
        order
    ]
    realised = frame.groupby("label").realised_sparsity.mean().reindex(order)
    shown = wide.map(lambda value: None if pd.isna(value) else f"{100 * value:.1f}").reset_index(names="")
    shown.loc[len(shown)] = ["realised gate sparsity, %", *(f"{100 * value:.1f}" for value in realised)]
    return Table(shown)


def sources(outcomes: Sequence) -> list[dict]:
    """What `cats.notebook.end` prints of the documents of some outcomes, each task once."""
    known = {}
    for each in outcomes:
        digest = each.data["sha256"]
        known[each.task] = {
            "name": each.task,
            "split": each.data["split"],
            "documents": len(each.documents),
            "sha256": digest if isinstance(digest, str) else next(iter(digest.values()), "unknown"),
        }
    return list(known.values())

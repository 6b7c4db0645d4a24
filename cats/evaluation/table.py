"""Tables of results, sparse beside dense on the same documents, and the records made of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from cats import criteria
from cats.errors import CatsError
from cats.evaluation import rows
from cats.evaluation.result import Result
from cats.evaluation.rows import AVERAGE
from cats.records import record as records

__all__ = ["AVERAGE", "load_results", "results_table", "write_records"]
_NUMBERS = ("delta", "delta_acc", "delta_nll", "delta_low", "delta_high")


def load_results(paths: Iterable[Path]) -> list[Result]:
    """The results in result files; raises CatsError for a damaged one."""
    return [Result.load(path) for path in paths]


def results_table(results: Sequence[Result]) -> pd.DataFrame:
    """One row for each result (`rows.AnswerRow` or `rows.TextRow`), with its difference to the dense model on
    the same documents, NaN where there is no dense result.

    Where all eight tasks of the paper are there, their average follows.
    """
    dense = [_dense(one, results) for one in results]
    groups: dict[tuple, list[int]] = {}
    for number, one in enumerate(results):
        groups.setdefault(_method_key(one), []).append(number)
    averages = (rows.average([results[n] for n in of], [dense[n] for n in of]) for of in groups.values())
    single = [rows.row(one, base) for one, base in zip(results, dense, strict=True)]
    table = pd.DataFrame([*single, *(mean for mean in averages if mean is not None)])
    return table.astype({name: float for name in _NUMBERS if name in table})


def write_records(
    results: Sequence[Result], slug: str, *, parameters: dict, folder: Path | None = None
) -> list[Path]:
    """Write a record of each experiment that the results belong to; returns their paths.

    The score of every document is in the rows as `correct` (see `cats.records.packing`). Raises CatsError
    where the results are of several models.
    """
    if len({each.model["id"] for each in results}) > 1:
        raise CatsError("A record is about one model: give the results of one.")
    table = results_table(results)
    written = []
    for experiment, part in table.groupby("experiment"):
        data = [each.data for each in results if rows.experiment_of(each) == experiment]
        unique = list(
            {
                each["sha256"] if isinstance(each["sha256"], str) else each["task"]: each for each in data
            }.values()
        )
        part = part.drop(columns="experiment").dropna(axis=1, how="all").astype(object)
        part = part.where(part.notna(), None)
        for column in records.COLUMNS[experiment]:
            if column not in part:
                part[column] = None
        written.append(
            records.write(
                experiment,
                slug,
                parameters=parameters,
                rows=part,
                model=results[0].model,
                data={"tasks": unique},
                folder=folder,
            )
        )
    return written


def _method_key(result: Result) -> tuple:
    """What the results of one method have in common."""
    chosen = result.method
    return (
        result.model["id"],
        *(str(chosen.get(name)) for name in ("rule", "sparsity", "level", "policy", "chat", "documents")),
    )


def _dense(result: Result, results: Sequence[Result]) -> Result | None:
    """The dense result on the same task and documents; None for a dense one, or where there is none."""
    if result.method["rule"] == criteria.DENSE:
        return None
    for other in results:
        if (
            other.method["rule"] == criteria.DENSE
            and (other.model["id"], other.task, other.documents)
            == (result.model["id"], result.task, result.documents)
            and other.method["chat"] == result.method["chat"]
        ):
            return other
    return None

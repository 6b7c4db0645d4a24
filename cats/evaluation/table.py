"""Tables of results, sparse beside dense on the same documents, and the records made of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cats import criteria
from cats.errors import CatsError
from cats.evaluation.intervals import difference, mean_difference
from cats.evaluation.perplexity import paired_interval
from cats.evaluation.result import Result
from cats.evaluation.task_list import PAPER, TASKS
from cats.records import record as records
from cats.records.packing import pack

AVERAGE = "average of 8"
_EXAMPLES, _EXAMPLE = 3, 700  # of what broke: how many, and characters of each text
# of a task that answers with a choice, or with a text, or with a likelihood
KINDS = {"exact_match": "generation", "nll_nats": "perplexity", "word_perplexity": "perplexity"}


def load_results(paths: Iterable[Path]) -> list[Result]:
    """The results in result files; raises CatsError for a damaged one."""
    return [Result.load(path) for path in paths]


def results_table(results: Sequence[Result]) -> pd.DataFrame:
    """One row for each result, with its paired difference to the dense model on the same documents.

    Columns as in the records `zero_shot`, `generation` and `perplexity` (told apart by `experiment`), and
    realised_prefill, realised_decode, mcnemar_p, policy and tokens_per_s. Where all eight tasks of the
    paper are there, their average follows. Differences are None where there is no dense result.
    """
    rows = [_row(each, _dense(each, results)) for each in results]
    rows += [row for group in _groups(results).values() if (row := _average(group, results)) is not None]
    return pd.DataFrame(rows)


def write_records(
    results: Sequence[Result], slug: str, *, parameters: dict, started: float, folder: Path | None = None
) -> list[Path]:
    """Write a record of each experiment that the results belong to; returns their paths.

    The score of every document is in the rows as `correct` (see `cats.packing.pack`). Raises CatsError
    where the results are of several models.
    """
    if len({each.model["id"] for each in results}) > 1:
        raise CatsError("A record is about one model: give the results of one.")
    rows = results_table(results)
    written = []
    for experiment, part in rows.groupby("experiment"):
        data = [each.data for each in results if kind(each) == experiment]
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
                started=started,
                folder=folder,
            )
        )
    return written


def kind(result: Result) -> str:
    """The experiment that an result belongs to: zero_shot, generation or perplexity."""
    return next((name for metric, name in KINDS.items() if metric in result.metrics), "zero_shot")


def pair(result: Result, dense: Result, metric: str) -> dict:
    """Difference of a metric between two results on the same documents, as `cats.pairs.difference` gives
    it.
    """
    if (result.task, result.documents) != (dense.task, dense.documents):
        raise CatsError(f"{result.task} and {dense.task} were not evaluated on the same documents.")
    return difference(dense.scores[metric], result.scores[metric])


def title(result: Result) -> str:
    """What a table calls the rule."""
    rule = result.method["rule"]
    return rule if rule == criteria.DENSE else criteria.rule(rule).title


def _row(result: Result, dense: Result | None) -> dict:
    experiment = kind(result)
    row = {
        **_common(result),
        "experiment": experiment,
        "task": result.task,
        "documents": len(result.documents),
    }
    if experiment == "perplexity":
        return row | _likelihood(result, dense)
    metric = "exact_match" if experiment == "generation" else "acc"
    row |= {name: value for name, value in result.metrics.items()}
    row |= {"acc_norm": row.get("acc_norm"), "acc_norm_se": row.get("acc_norm_se")} if metric == "acc" else {}
    row |= {"correct": pack(result.scores[metric]), "shots": result.method["shots"]}
    if "acc_norm" in result.scores:
        row["correct_norm"] = pack(result.scores["acc_norm"])
    prefix = "delta_acc" if metric == "acc" else "delta"
    if dense is not None:
        compared = pair(result, dense, metric)
        row |= {prefix: compared["delta"], "delta_low": compared["low"], "delta_high": compared["high"]}
        row |= {name: compared[name] for name in ("mcnemar_p", "gained", "lost")}
        if result.texts is not None:
            row["examples"] = _examples(result, dense, metric)
    else:
        row |= {prefix: None, "delta_low": None, "delta_high": None}
    return row


def _examples(result: Result, dense: Result, metric: str) -> list[dict]:
    """The first documents that only the dense model gets right: question, and both texts, cut where long."""
    lost = [
        place
        for place, (before, after) in enumerate(zip(dense.scores[metric], result.scores[metric], strict=True))
        if before == 1 and after == 0
    ]
    return [
        {
            "document": result.documents[place],
            "question": result.asked[place][:_EXAMPLE],
            "dense": dense.texts[place][:_EXAMPLE],
            "sparse": result.texts[place][:_EXAMPLE],
        }
        for place in lost[:_EXAMPLES]
    ]


def _likelihood(result: Result, dense: Result | None) -> dict:
    """A row of perplexity: per token of a text, or per word of lm-eval's wikitext."""
    by_word = "word_perplexity" in result.metrics
    metric = "word_perplexity" if by_word else "nll"
    units = result.scores[metric][:, 1]
    perplexity = result.metrics["word_perplexity" if by_word else "perplexity"]
    row = {
        "corpus": result.task.removeprefix("text:"),
        "unit": "word" if by_word else "token",
        "tokens": int(units.sum()),
        "nll_nats": float(np.log(perplexity)),
        "perplexity": perplexity,
        "delta_nll": None,
        "delta_low": None,
        "delta_high": None,
    }
    if dense is not None and len(units) > 1:
        row |= paired_interval(_sums(dense, metric), _sums(result, metric))
    return row


def _sums(result: Result, metric: str) -> pd.DataFrame:
    scores = result.scores[metric]
    counted = scores[:, 1] > 0
    return pd.DataFrame(
        {
            "document": np.asarray(result.documents)[counted],
            "tokens": scores[counted, 1].astype(int),
            "nll_nats": -scores[counted, 0],
        }
    )


def _common(result: Result) -> dict:
    realised = result.sparsity["realised"]
    share = {
        phase: realised[phase]["gate_sparsity"] if phase in realised else None
        for phase in ("prefill", "decode")
    }
    return {
        "model": result.model["id"],
        "method": title(result),
        "rule": result.method["rule"],
        "gate_sparsity": result.sparsity["gate_target"],
        "model_sparsity": result.sparsity["model_target"],
        "bytes_per_token": result.sparsity["bytes_per_token"],
        "realised_sparsity": result.sparsity["gate_realised"],
        "realised_model_sparsity": result.sparsity["model_realised"],
        "realised_prefill": share["prefill"],
        "realised_decode": share["decode"],
        **_corrections(result),
        "policy": result.method["policy"],
        "tokens_per_s": result.speed["tokens_per_s"],
    }


def _corrections(result: Result) -> dict:
    """Steps of each kind a token of the answers, where the dense model corrects a sparse one."""
    tokens = result.sparsity.get("corrected_tokens")
    if not tokens:
        return {}
    return {
        f"{kind}_steps_per_token": result.sparsity[f"corrected_{kind}_steps"] / tokens
        for kind in ("sparse", "dense")
    }


def _average(group: list[Result], results: Sequence[Result]) -> dict | None:
    """The plain mean over the paper's eight tasks, its interval from each task's documents drawn anew."""
    by_task = {stock(each.task): each for each in group if stock(each.task) in PAPER}
    if len(by_task) < len(PAPER):
        return None
    chosen = [by_task[name] for name in PAPER]
    errors = np.array([each.metrics["acc_se"] for each in chosen])
    row = {
        **_common(chosen[0]),
        "experiment": "zero_shot",
        "task": AVERAGE,
        "documents": sum(len(each.documents) for each in chosen),
        "acc": float(np.mean([each.metrics["acc"] for each in chosen])),
        "acc_se": float(np.sqrt((errors**2).sum()) / len(chosen)),
        "acc_norm": None,
        "acc_norm_se": None,
        "realised_sparsity": None
        if chosen[0].sparsity["gate_realised"] is None
        else float(np.mean([each.sparsity["gate_realised"] for each in chosen])),
        "realised_model_sparsity": float(np.mean([each.sparsity["model_realised"] for each in chosen])),
        "realised_prefill": None,
        "delta_acc": None,
        "delta_low": None,
        "delta_high": None,
        "tokens_per_s": sum(each.speed["tokens"] for each in chosen)
        / sum(each.speed["seconds"] for each in chosen),
    }
    dense = [_dense(each, results) for each in chosen]
    if all(dense):
        pairs = [(d.scores["acc"], each.scores["acc"]) for d, each in zip(dense, chosen, strict=True)]
        compared = mean_difference(pairs)
        row |= {"delta_acc": compared["delta"], "delta_low": compared["low"], "delta_high": compared["high"]}
        row["share_of_dense"] = row["acc"] / float(np.mean([each.metrics["acc"] for each in dense]))
    return row


def _groups(results: Sequence[Result]) -> dict[tuple, list[Result]]:
    groups: dict[tuple, list[Result]] = {}
    for each in results:
        groups.setdefault(_key(each), []).append(each)
    return groups


def _key(result: Result) -> tuple:
    """What results of one method share."""
    chosen = result.method
    return (
        result.model["id"],
        *(str(chosen.get(name)) for name in ("rule", "sparsity", "level", "policy", "chat", "documents")),
    )


def _dense(result: Result, results: Sequence[Result]) -> Result | None:
    """The dense result on the same task and documents, None for a dense one itself or where there is
    none.
    """
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


def stock(name: str) -> str:
    """The task that a variant stands in for."""
    return next((known for known, task in TASKS.items() if task.variant and task.variant[0] == name), name)

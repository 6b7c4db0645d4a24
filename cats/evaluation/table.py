"""Tables of outcomes, sparse beside dense on the same documents, and the records made of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cats import criteria
from cats.errors import CatsError
from cats.evaluation.intervals import difference, mean_difference
from cats.evaluation.perplexity import paired_interval
from cats.evaluation.result import Outcome
from cats.evaluation.task_list import PAPER, TASKS
from cats.records import record as records
from cats.records.packing import pack

AVERAGE = "average of 8"
_EXAMPLES, _EXAMPLE = 3, 700  # of what broke: how many, and characters of each text
# of a task that answers with a choice, or with a text, or with a likelihood
KINDS = {"exact_match": "generation", "nll_nats": "perplexity", "word_perplexity": "perplexity"}


def load(paths: Iterable[Path]) -> list[Outcome]:
    """The outcomes in result files; raises CatsError for a damaged one."""
    return [Outcome.load(path) for path in paths]


def table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row for each outcome, with its paired difference to the dense model on the same documents.

    Columns as in the records `zero_shot`, `generation` and `perplexity` (told apart by `experiment`), and
    realised_prefill, realised_decode, mcnemar_p, policy and tokens_per_s. Where all eight tasks of the
    paper are there, their average follows. Differences are None where there is no dense outcome.
    """
    rows = [_row(each, _dense(each, outcomes)) for each in outcomes]
    rows += [row for group in _groups(outcomes).values() if (row := _average(group, outcomes)) is not None]
    return pd.DataFrame(rows)


def record(
    outcomes: Sequence[Outcome], slug: str, *, parameters: dict, started: float, folder: Path | None = None
) -> list[Path]:
    """Write a record of each experiment that the outcomes belong to; returns their paths.

    The score of every document is in the rows as `correct` (see `cats.packing.pack`). Raises CatsError
    where the outcomes are of several models.
    """
    if len({each.model["id"] for each in outcomes}) > 1:
        raise CatsError("A record is about one model: give the results of one.")
    rows = table(outcomes)
    written = []
    for experiment, part in rows.groupby("experiment"):
        data = [each.data for each in outcomes if kind(each) == experiment]
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
                model=outcomes[0].model,
                data={"tasks": unique},
                started=started,
                folder=folder,
            )
        )
    return written


def kind(outcome: Outcome) -> str:
    """The experiment that an outcome belongs to: zero_shot, generation or perplexity."""
    return next((name for metric, name in KINDS.items() if metric in outcome.metrics), "zero_shot")


def pair(outcome: Outcome, dense: Outcome, metric: str) -> dict:
    """Difference of a metric between two outcomes on the same documents, as `cats.pairs.difference` gives
    it.
    """
    if (outcome.task, outcome.documents) != (dense.task, dense.documents):
        raise CatsError(f"{outcome.task} and {dense.task} were not evaluated on the same documents.")
    return difference(dense.scores[metric], outcome.scores[metric])


def title(outcome: Outcome) -> str:
    """What a table calls the rule."""
    rule = outcome.configuration["rule"]
    return rule if rule == criteria.DENSE else criteria.rule(rule).title


def _row(outcome: Outcome, dense: Outcome | None) -> dict:
    experiment = kind(outcome)
    row = {
        **_common(outcome),
        "experiment": experiment,
        "task": outcome.task,
        "documents": len(outcome.documents),
    }
    if experiment == "perplexity":
        return row | _likelihood(outcome, dense)
    metric = "exact_match" if experiment == "generation" else "acc"
    row |= {name: value for name, value in outcome.metrics.items()}
    row |= {"acc_norm": row.get("acc_norm"), "acc_norm_se": row.get("acc_norm_se")} if metric == "acc" else {}
    row |= {"correct": pack(outcome.scores[metric]), "shots": outcome.configuration["shots"]}
    if "acc_norm" in outcome.scores:
        row["correct_norm"] = pack(outcome.scores["acc_norm"])
    prefix = "delta_acc" if metric == "acc" else "delta"
    if dense is not None:
        compared = pair(outcome, dense, metric)
        row |= {prefix: compared["delta"], "delta_low": compared["low"], "delta_high": compared["high"]}
        row |= {name: compared[name] for name in ("mcnemar_p", "gained", "lost")}
        if outcome.texts is not None:
            row["examples"] = _examples(outcome, dense, metric)
    else:
        row |= {prefix: None, "delta_low": None, "delta_high": None}
    return row


def _examples(outcome: Outcome, dense: Outcome, metric: str) -> list[dict]:
    """The first documents that only the dense model gets right: question, and both texts, cut where long."""
    lost = [
        place
        for place, (before, after) in enumerate(
            zip(dense.scores[metric], outcome.scores[metric], strict=True)
        )
        if before == 1 and after == 0
    ]
    return [
        {
            "document": outcome.documents[place],
            "question": outcome.asked[place][:_EXAMPLE],
            "dense": dense.texts[place][:_EXAMPLE],
            "sparse": outcome.texts[place][:_EXAMPLE],
        }
        for place in lost[:_EXAMPLES]
    ]


def _likelihood(outcome: Outcome, dense: Outcome | None) -> dict:
    """A row of perplexity: per token of a text, or per word of lm-eval's wikitext."""
    by_word = "word_perplexity" in outcome.metrics
    metric = "word_perplexity" if by_word else "nll"
    units = outcome.scores[metric][:, 1]
    perplexity = outcome.metrics["word_perplexity" if by_word else "perplexity"]
    row = {
        "corpus": outcome.task.removeprefix("text:"),
        "unit": "word" if by_word else "token",
        "tokens": int(units.sum()),
        "nll_nats": float(np.log(perplexity)),
        "perplexity": perplexity,
        "delta_nll": None,
        "delta_low": None,
        "delta_high": None,
    }
    if dense is not None and len(units) > 1:
        row |= paired_interval(_sums(dense, metric), _sums(outcome, metric))
    return row


def _sums(outcome: Outcome, metric: str) -> pd.DataFrame:
    scores = outcome.scores[metric]
    counted = scores[:, 1] > 0
    return pd.DataFrame(
        {
            "document": np.asarray(outcome.documents)[counted],
            "tokens": scores[counted, 1].astype(int),
            "nll_nats": -scores[counted, 0],
        }
    )


def _common(outcome: Outcome) -> dict:
    realised = outcome.sparsity["realised"]
    share = {
        phase: realised[phase]["gate_sparsity"] if phase in realised else None
        for phase in ("prefill", "decode")
    }
    return {
        "model": outcome.model["id"],
        "method": title(outcome),
        "rule": outcome.configuration["rule"],
        "gate_sparsity": outcome.sparsity["gate_target"],
        "model_sparsity": outcome.sparsity["model_target"],
        "bytes_per_token": outcome.sparsity["bytes_per_token"],
        "realised_sparsity": outcome.sparsity["gate_realised"],
        "realised_model_sparsity": outcome.sparsity["model_realised"],
        "realised_prefill": share["prefill"],
        "realised_decode": share["decode"],
        **_corrections(outcome),
        "policy": outcome.configuration["policy"],
        "tokens_per_s": outcome.speed["tokens_per_s"],
    }


def _corrections(outcome: Outcome) -> dict:
    """Steps of each kind a token of the answers, where the dense model corrects a sparse one."""
    tokens = outcome.sparsity.get("corrected_tokens")
    if not tokens:
        return {}
    return {
        f"{kind}_steps_per_token": outcome.sparsity[f"corrected_{kind}_steps"] / tokens
        for kind in ("sparse", "dense")
    }


def _average(group: list[Outcome], outcomes: Sequence[Outcome]) -> dict | None:
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
    dense = [_dense(each, outcomes) for each in chosen]
    if all(dense):
        pairs = [(d.scores["acc"], each.scores["acc"]) for d, each in zip(dense, chosen, strict=True)]
        compared = mean_difference(pairs)
        row |= {"delta_acc": compared["delta"], "delta_low": compared["low"], "delta_high": compared["high"]}
        row["share_of_dense"] = row["acc"] / float(np.mean([each.metrics["acc"] for each in dense]))
    return row


def _groups(outcomes: Sequence[Outcome]) -> dict[tuple, list[Outcome]]:
    groups: dict[tuple, list[Outcome]] = {}
    for each in outcomes:
        groups.setdefault(_key(each), []).append(each)
    return groups


def _key(outcome: Outcome) -> tuple:
    """What outcomes of one configuration share."""
    chosen = outcome.configuration
    return (
        outcome.model["id"],
        *(str(chosen.get(name)) for name in ("rule", "sparsity", "level", "policy", "chat", "documents")),
    )


def _dense(outcome: Outcome, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The dense outcome on the same task and documents, None for a dense one itself or where there is
    none.
    """
    if outcome.configuration["rule"] == criteria.DENSE:
        return None
    for other in outcomes:
        if (
            other.configuration["rule"] == criteria.DENSE
            and (other.model["id"], other.task, other.documents)
            == (outcome.model["id"], outcome.task, outcome.documents)
            and other.configuration["chat"] == outcome.configuration["chat"]
        ):
            return other
    return None


def stock(name: str) -> str:
    """The task that a variant stands in for."""
    return next((known for known, task in TASKS.items() if task.variant and task.variant[0] == name), name)

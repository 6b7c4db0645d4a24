"""A table's rows: one for each result, with its paired difference to the dense model, and their averages."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import pandas as pd

from cats import criteria
from cats.errors import CatsError
from cats.evaluation.intervals import difference, mean_difference, paired_interval, share_above_chance
from cats.evaluation.result import Result
from cats.evaluation.task_list import PAPER, TASKS, stock
from cats.records.packing import pack

AVERAGE = "average of 8"
_EXAMPLES, _EXAMPLE = 3, 700  # of what broke: how many, and characters of each text
# of a task that answers with a text, or with a likelihood; the others answer with a choice
_EXPERIMENTS = {"exact_match": "generation", "nll_nats": "perplexity", "word_perplexity": "perplexity"}


class MethodColumns(TypedDict, total=False):
    """What every row says about its method."""

    model: str
    method: str  # the rule as tables call it
    rule: str
    gate_sparsity: float  # target
    model_sparsity: float  # target, of the blocks' linear weights
    bytes_per_token: float  # 16-bit weights, from the target
    realised_bytes_per_token: float | None  # None in results of earlier versions
    realised_sparsity: float | None  # of gate activations
    realised_model_sparsity: float
    realised_prefill: float | None  # of gate activations
    realised_decode: float | None
    sparse_steps_per_token: float  # where the dense model corrects a sparse one
    dense_steps_per_token: float
    policy: dict | None
    tokens_per_s: float
    origins: list[dict]  # of the runs that it comes from


class AnswerRow(MethodColumns, total=False):
    """A row of the experiments zero_shot and generation; differences are to dense, on the same documents."""

    experiment: str
    task: str
    documents: int
    shots: int
    acc: float  # and acc_se; exact_match in place of both where a text is generated
    acc_norm: float | None  # by length of the answers; and acc_norm_se
    correct: dict  # packed: the score of each document, and correct_norm those of acc_norm
    delta_acc: float | None  # `delta` where a text is generated
    delta_low: float | None  # None below `intervals.FEWEST` documents
    delta_high: float | None
    interval: str | None  # how the interval was made
    mcnemar_p: float
    gained: int  # documents that only this method gets right
    lost: int
    chance: float  # what a guess scores
    share_of_dense: float
    share_above_chance: float  # of what the dense model has above chance
    examples: list[dict]  # the first documents that only dense gets right


class TextRow(MethodColumns, total=False):
    """A row of the experiment perplexity."""

    experiment: str
    task: str
    documents: int
    corpus: str
    unit: str  # "token", or "word" for lm-eval's wikitext
    tokens: int  # that many units were scored
    nll_nats: float  # a unit
    perplexity: float
    delta_nll: float | None
    delta_low: float | None
    delta_high: float | None
    interval: str | None


def experiment_of(result: Result) -> str:
    """The experiment that a result belongs to: zero_shot, generation or perplexity."""
    return next((name for metric, name in _EXPERIMENTS.items() if metric in result.metrics), "zero_shot")


def paired_difference(result: Result, dense: Result, metric: str) -> dict:
    """`intervals.difference` of a metric between two results; CatsError unless on the same documents."""
    if (result.task, result.documents) != (dense.task, dense.documents):
        raise CatsError(f"{result.task} and {dense.task} were not evaluated on the same documents.")
    return difference(dense.scores[metric], result.scores[metric])


def method_title(result: Result) -> str:
    """What a table calls the rule."""
    rule = result.method["rule"]
    return rule if rule == criteria.DENSE else criteria.rule(rule).title


def row(result: Result, dense: Result | None) -> AnswerRow | TextRow:
    """The row of one result; without the dense one on the same documents its differences are None."""
    experiment = experiment_of(result)
    columns = {
        **_common(result),
        "experiment": experiment,
        "task": result.task,
        "documents": len(result.documents),
    }
    if experiment == "perplexity":
        return columns | _likelihood(result, dense)
    metric = "exact_match" if experiment == "generation" else "acc"
    columns |= result.metrics
    if metric == "acc":
        columns |= {name: columns.get(name) for name in ("acc_norm", "acc_norm_se")}
    columns |= {"correct": pack(result.scores[metric]), "shots": result.method["shots"]}
    if "acc_norm" in result.scores:
        columns["correct_norm"] = pack(result.scores["acc_norm"])
    prefix = "delta_acc" if metric == "acc" else "delta"
    columns |= {prefix: None, "delta_low": None, "delta_high": None}
    if dense is not None:
        compared = paired_difference(result, dense, metric)
        columns |= {prefix: compared["delta"], "delta_low": compared["low"], "delta_high": compared["high"]}
        columns |= {name: compared[name] for name in ("interval", "mcnemar_p", "gained", "lost")}
        chance = TASKS[stock(result.task)].chance
        columns |= _shares(result.metrics[metric], dense.metrics[metric], chance)
        if result.texts is not None:
            columns["examples"] = _examples(result, dense, metric)
    return columns


def average(results: list[Result], dense: Sequence[Result | None]) -> AnswerRow | None:
    """The plain mean over the paper's eight tasks, its interval from each task's documents drawn anew.

    `results`: of one method, `dense` those beside them. None where a task is missing.
    """
    by_task = {stock(one.task): (one, base) for one, base in zip(results, dense, strict=True)}
    if not all(name in by_task for name in PAPER):
        return None
    chosen, bases = zip(*(by_task[name] for name in PAPER), strict=True)
    errors = np.array([one.metrics["acc_se"] for one in chosen])
    gate = [one.sparsity["gate_realised"] for one in chosen]
    columns = {
        **_common(chosen[0]),
        "experiment": "zero_shot",
        "task": AVERAGE,
        "documents": sum(len(one.documents) for one in chosen),
        "acc": float(np.mean([one.metrics["acc"] for one in chosen])),
        "acc_se": float(np.sqrt((errors**2).sum()) / len(chosen)),
        "acc_norm": None,
        "acc_norm_se": None,
        "realised_sparsity": None if gate[0] is None else float(np.mean(gate)),
        "realised_model_sparsity": float(np.mean([one.sparsity["model_realised"] for one in chosen])),
        "realised_bytes_per_token": _mean([one.sparsity.get("bytes_realised") for one in chosen]),
        "realised_prefill": None,
        "delta_acc": None,
        "delta_low": None,
        "delta_high": None,
        "origins": [one.origin for one in chosen if one.origin],
        "tokens_per_s": sum(one.speed["tokens"] for one in chosen)
        / sum(one.speed["seconds"] for one in chosen),
    }
    if all(bases):
        pairs = [(base.scores["acc"], one.scores["acc"]) for one, base in zip(chosen, bases, strict=True)]
        compared = mean_difference(pairs)
        columns |= {"delta_acc": compared["delta"], "interval": compared["interval"]}
        columns |= {"delta_low": compared["low"], "delta_high": compared["high"]}
        chance = float(np.mean([TASKS[name].chance for name in PAPER]))
        columns |= _shares(columns["acc"], float(np.mean([base.metrics["acc"] for base in bases])), chance)
    return columns


def _shares(score: float, dense: float, chance: float) -> dict:
    return {
        "chance": chance,
        "share_of_dense": score / dense if dense else None,
        "share_above_chance": share_above_chance(score, dense, chance),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else float(np.mean(values))


def _examples(result: Result, dense: Result, metric: str) -> list[dict]:
    """The first documents that only the dense model gets right: question, and both texts, cut to _EXAMPLE."""
    pairs = zip(dense.scores[metric], result.scores[metric], strict=True)
    lost = [number for number, (before, after) in enumerate(pairs) if before == 1 and after == 0]
    return [
        {
            "document": result.documents[number],
            "question": result.asked[number][:_EXAMPLE],
            "dense": dense.texts[number][:_EXAMPLE],
            "sparse": result.texts[number][:_EXAMPLE],
        }
        for number in lost[:_EXAMPLES]
    ]


def _likelihood(result: Result, dense: Result | None) -> dict:
    """A row of perplexity: per token of a text, or per word of lm-eval's wikitext."""
    by_word = "word_perplexity" in result.metrics
    metric = "word_perplexity" if by_word else "nll"
    units = result.scores[metric][:, 1]
    perplexity = result.metrics["word_perplexity" if by_word else "perplexity"]
    columns = {
        "corpus": result.task.removeprefix("text:"),
        "unit": "word" if by_word else "token",
        "tokens": int(units.sum()),
        "nll_nats": float(np.log(perplexity)),
        "perplexity": perplexity,
        "delta_nll": None,
        "delta_low": None,
        "delta_high": None,
    }
    if dense is not None:
        columns |= paired_interval(_sums(dense, metric), _sums(result, metric))
    return columns


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
    share = {phase: realised.get(phase, {}).get("gate_sparsity") for phase in ("prefill", "decode")}
    return {
        "model": result.model["id"],
        "method": method_title(result),
        "rule": result.method["rule"],
        "gate_sparsity": result.sparsity["gate_target"],
        "model_sparsity": result.sparsity["model_target"],
        "bytes_per_token": result.sparsity["bytes_per_token"],
        "realised_bytes_per_token": result.sparsity.get("bytes_realised"),
        "realised_sparsity": result.sparsity["gate_realised"],
        "realised_model_sparsity": result.sparsity["model_realised"],
        "realised_prefill": share["prefill"],
        "realised_decode": share["decode"],
        **_corrections(result),
        "policy": result.method["policy"],
        "tokens_per_s": result.speed["tokens_per_s"],
        "origins": [result.origin] if result.origin else [],
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

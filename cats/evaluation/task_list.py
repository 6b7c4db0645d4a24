"""The tasks that can be evaluated, by name: the paper's eight, those of its rebuttal, and one that needs no
data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets

from cats.errors import CatsError, did_you_mean
from cats.evaluation import docs_cloze as cloze


def _without_support(rows) -> bool:
    return not any(text.strip() for text in rows["support"])


def _with_unk(rows) -> bool:
    return any(" <unk> " in page for page in rows["page"])


def _without_titles(rows) -> bool:
    return sum(" -- " in passage[:200] for passage in rows["passage"]) < len(rows) / 2


@dataclass(frozen=True)
class Task:
    """One task: its YAML inside lm-eval, its headline metric, and under which other name a differing copy
    goes.

    `variant`: (name, test on the rows of the evaluated split, what the difference is).
    """

    yaml: str | None
    metric: str = "acc"
    variant: tuple[str, Callable[[datasets.Dataset], bool], str] | None = None


TASKS = {
    "winogrande": Task("winogrande/default.yaml"),
    "piqa": Task("piqa/piqa.yaml"),
    "sciq": Task(
        "sciq/sciq.yaml",
        variant=("sciq_closed_book", _without_support, "no support passage: markedly harder than sciq"),
    ),
    "openbookqa": Task("openbookqa/openbookqa.yaml"),
    "hellaswag": Task("hellaswag/hellaswag.yaml"),
    "boolq": Task(
        "super_glue/boolq/default.yaml",
        variant=("boolq_untitled", _without_titles, "passages without the article's title"),
    ),
    "arc_easy": Task("arc/arc_easy.yaml"),
    "arc_challenge": Task("arc/arc_challenge.yaml"),
    "lambada_openai": Task("lambada/lambada_openai.yaml"),
    "gsm8k": Task("gsm8k/gsm8k.yaml", metric="exact_match"),
    "wikitext": Task(
        "wikitext/wikitext.yaml",
        metric="word_perplexity",
        variant=(
            "wikitext_tokenised",
            _with_unk,
            "the tokenised text with <unk>: not comparable with the raw one",
        ),
    ),
    cloze.NAME: Task(None),
}
# The paper's Table 1; its average is the plain mean of acc.
PAPER = ("winogrande", "piqa", "sciq", "openbookqa", "hellaswag", "boolq", "arc_easy", "arc_challenge")
VARIANTS = {task.variant[0]: name for name, task in TASKS.items() if task.variant}


def names(wanted: Sequence[str]) -> list[str]:
    """The tasks of `wanted` in order, "paper" being the paper's eight; raises CatsError for an unknown
    one.
    """
    result: list[str] = []
    for name in wanted:
        for task in PAPER if name == "paper" else [VARIANTS.get(name, name)]:
            if task not in TASKS:
                near = did_you_mean(task, TASKS)
                raise CatsError(f"Unknown task {task!r}{near}: use paper, {', '.join(TASKS)}.")
            if task not in result:
                result.append(task)
    return result

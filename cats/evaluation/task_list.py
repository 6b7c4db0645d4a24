"""lm-eval's tasks by name: the paper's eight, those of its rebuttal, and one that needs no data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cats.errors import CatsError, did_you_mean

DOCS_CLOZE = "docs_cloze"


def _without_support(rows) -> bool:
    return not any(text.strip() for text in rows["support"])


def _with_unk(rows) -> bool:
    return any(" <unk> " in page for page in rows["page"])


def _without_titles(rows) -> bool:
    return sum(" -- " in passage[:200] for passage in rows["passage"]) < len(rows) / 2


@dataclass(frozen=True)
class ListedTask:
    """One task: its YAML inside lm-eval (None: `docs_cloze`), what a guess scores, its headline metric,
    and under which other name a differing copy goes.

    `chance`: expected accuracy of a uniform guess among a question's answers, 0 where an answer is a text.
    `variant`: (name, test on the rows of the evaluated split, what the difference is).
    """

    yaml: str | None
    chance: float = 0.0
    metric: str = "acc"
    variant: tuple[str, Callable, str] | None = None


TASKS = {
    "winogrande": ListedTask("winogrande/default.yaml", chance=1 / 2),
    "piqa": ListedTask("piqa/piqa.yaml", chance=1 / 2),
    "sciq": ListedTask(
        "sciq/sciq.yaml",
        chance=1 / 4,
        variant=("sciq_closed_book", _without_support, "no support passage: markedly harder than sciq"),
    ),
    "openbookqa": ListedTask("openbookqa/openbookqa.yaml", chance=1 / 4),
    "hellaswag": ListedTask("hellaswag/hellaswag.yaml", chance=1 / 4),
    "boolq": ListedTask(
        "super_glue/boolq/default.yaml",
        chance=1 / 2,
        variant=("boolq_untitled", _without_titles, "passages without the article's title"),
    ),
    "arc_easy": ListedTask("arc/arc_easy.yaml", chance=1 / 4),  # 3 or 5 answers in less than 1 % of both
    "arc_challenge": ListedTask("arc/arc_challenge.yaml", chance=1 / 4),
    "lambada_openai": ListedTask("lambada/lambada_openai.yaml"),
    "gsm8k": ListedTask("gsm8k/gsm8k.yaml", metric="exact_match"),
    "wikitext": ListedTask(
        "wikitext/wikitext.yaml",
        metric="word_perplexity",
        variant=(
            "wikitext_tokenised",
            _with_unk,
            "the tokenised text with <unk>: not comparable with the raw one",
        ),
    ),
    DOCS_CLOZE: ListedTask(None, chance=1 / 4),
}
# The paper's Table 1; its average is the plain mean of acc.
PAPER = ("winogrande", "piqa", "sciq", "openbookqa", "hellaswag", "boolq", "arc_easy", "arc_challenge")
VARIANTS = {task.variant[0]: name for name, task in TASKS.items() if task.variant}


def names(wanted: Sequence[str]) -> list[str]:
    """The tasks of `wanted` in order, "paper" being the paper's eight; CatsError for an unknown one."""
    result: list[str] = []
    for name in wanted:
        for task in PAPER if name == "paper" else [VARIANTS.get(name, name)]:
            if task not in TASKS:
                near = did_you_mean(task, TASKS)
                raise CatsError(f"Unknown task {task!r}{near}: use paper, {', '.join(TASKS)}.")
            if task not in result:
                result.append(task)
    return result


def stock(name: str) -> str:
    """The task that a variant stands in for."""
    return VARIANTS.get(name, name)

"""What is scored: a task of lm-eval, or the text of a corpus as "text:<corpus>"."""

import os
from collections.abc import Callable, Iterable, Sequence

from cats.evaluation import corpus_task, lm_eval_task, task_list
from cats.evaluation.task import Task


def names(wanted: Sequence[str]) -> list[str]:
    """Tasks by name, "paper" as its eight, and texts behind them; raises CatsError for an unknown task."""
    listed = task_list.names([name for name in wanted if not corpus_task.is_text(name)])
    return [*listed, *filter(corpus_task.is_text, wanted)]


def check(wanted: Iterable[str], data_dir: str | os.PathLike | None = None) -> None:
    """Raise CatsError for an unknown task or one without data, before any model is loaded."""
    for name in wanted:
        if corpus_task.is_text(name):
            corpus_task.check(name)
        else:
            lm_eval_task.check(name, data_dir)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    documents: int | None = None,
    seed: int = 0,
    chat_template: Callable | None = None,
    text_tokens: int | None = None,
) -> Task:
    """A task with its documents, a seeded draw of `documents` where there are more.

    `data_dir` and `chat_template` are for lm-eval's tasks (`lm_eval_task.load`), `text_tokens` is for texts
    (`corpus_task.load`). Raises CatsError for an unknown task and for missing or damaged data.
    """
    if corpus_task.is_text(name):
        return corpus_task.load(name, documents=documents, seed=seed, tokens=text_tokens)
    return lm_eval_task.load(
        name, data_dir=data_dir, documents=documents, seed=seed, chat_template=chat_template
    )


def read_tokens(name: str, text_tokens: int | None) -> int | None:
    """How many tokens of each document a task keeps; None for all of them, as lm-eval's tasks always do."""
    return text_tokens if corpus_task.is_text(name) else None

"""What every task is to the evaluator, and what a model answers."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cats.evaluation.distributed import Processes


@dataclass
class Answers:
    """What a model made of a task.

    `scores`: for each metric an array with one number for each document, or two, a log-probability and the
    units (tokens, words) that it is of. `texts`: what was generated, and `questions`: the last paragraph of
    each prompt; None where nothing is generated.
    """

    scores: dict[str, np.ndarray]
    texts: list[str] | None = None
    questions: list[str] | None = None


class Task(Protocol):
    """A task with its documents, kept between the methods that are evaluated on it."""

    name: str  # what tables call it
    documents: list[int]  # their numbers in the evaluated split, in order
    data: dict  # what a record says about them
    shots: int  # examples in each prompt

    def prepare(self, lm, processes: Processes) -> None:
        """Turn the text into token ids, once: that is no part of the time of the rule that comes first."""

    def score(self, lm, processes: Processes) -> Answers:
        """Every document's scores by `lm`, a `cats.evaluation.hflm.MaskedHFLM`; the processes share the
        documents."""

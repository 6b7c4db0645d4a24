"""A model's responses to lm-eval's requests, shared among processes, and the scores that lm-eval makes of
them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import lm_eval.utils
import numpy as np
from lm_eval.api.task import ConfigurableTask

from cats.errors import CatsError
from cats.evaluation.distributed import Processes


def answer(requests: list, encoded: list | None, lm, processes: Processes) -> list:
    """The response of `lm` to each request, in order; each process answers for its share of the documents.

    `encoded`: the requests as token ids, where their answers are given.
    """
    mine = [n for n, request in enumerate(requests) if request.doc_id % processes.size == processes.rank]
    if encoded is not None:
        answered = lm._loglikelihood_tokens([encoded[n] for n in mine])
    else:
        answered = getattr(lm, requests[0].request_type)([requests[n] for n in mine])
    responses: dict[int, object] = {}
    for part in processes.gather(dict(zip(mine, answered, strict=True))):
        responses |= part
    if len(responses) != len(requests):
        raise CatsError(f"{len(responses)} of {len(requests)} requests were answered: run again.")
    return [responses[n] for n in range(len(requests))]


@contextmanager
def templates_kept() -> Iterator[None]:
    """Keep compiled templates: lm-eval compiles one anew for every document, which takes most of the time to
    build prompts and to score answers."""
    environment = lm_eval.utils.env
    with patched(environment, "from_string", lru_cache(environment.from_string)):
        yield


@templates_kept()
def score(task: ConfigurableTask, requests: list, responses: list) -> dict[str, np.ndarray]:
    """One score for each document and metric, from the responses to all requests, by lm-eval's own filters.

    Of several filters the first keeps the metric's name, the others add theirs (exact_match_flexible).
    """
    by_document: dict[int, list] = {}
    for request, response in zip(requests, responses, strict=True):
        request.resps = [response]
        request.filtered_resps = {}
        by_document.setdefault(request.doc_id, []).append(request)
    task.apply_filters()
    scores: dict[str, list] = {}
    for number, name in enumerate(requests[0].filtered_resps):
        suffix = "" if number == 0 else f"_{name.split('-')[0]}"
        for document in sorted(by_document):
            asked = sorted(by_document[document], key=lambda request: request.idx)
            values = task.process_results(asked[0].doc, [request.filtered_resps[name] for request in asked])
            for metric, value in values.items():
                scores.setdefault(metric + suffix, []).append(value)
    return {metric: np.asarray(values, dtype=float) for metric, values in scores.items()}


@contextmanager
def patched(owner, name: str, value) -> Iterator[None]:
    """Give `owner` another attribute of that name for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

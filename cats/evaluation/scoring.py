"""A model's responses to a task's requests, the documents shared among the processes of an evaluation."""

from cats.errors import CatsError
from cats.evaluation import tasks
from cats.evaluation.distributed import Processes
from cats.evaluation.hflm import MaskedHFLM


def answer(task: tasks.LoadedTask, lm: MaskedHFLM, processes: Processes) -> tuple[dict, list[str] | None]:
    """Scores of every document and, of generative tasks, the texts; the documents are shared among the
    processes.
    """
    requests = task.requests
    kind = requests[0].request_type
    mine = [n for n, request in enumerate(requests) if request.doc_id % processes.size == processes.rank]
    if kind == "loglikelihood":
        encode(task, lm)
        found = lm._loglikelihood_tokens([task.encoded[place] for place in mine])
    else:
        found = getattr(lm, kind)([requests[place] for place in mine])
    responses: dict[int, object] = {}
    for part in processes.gather(dict(zip(mine, found, strict=True))):
        responses |= part
    if len(responses) != len(requests):
        raise CatsError(f"{len(responses)} of {len(requests)} requests of {task.name} were answered.")
    ordered = [responses[place] for place in range(len(requests))]
    return tasks.score(task, ordered), ordered if kind == "generate_until" else None


def encode(task: tasks.LoadedTask, lm: MaskedHFLM) -> None:
    """Turn the requests of a task whose answers are scored into token ids, once for all models."""
    if task.encoded is None and task.requests[0].request_type == "loglikelihood":
        task.encoded = lm.encode(task.requests)


def questions(task: tasks.LoadedTask) -> list[str]:
    """The last paragraph of each prompt, behind its few-shot examples."""
    return [request.args[0].rsplit("\n\n", 1)[-1] for request in task.requests]

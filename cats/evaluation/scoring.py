"""A model's responses to a task's requests, the documents shared among the processes of an evaluation."""

from cats.errors import CatsError
from cats.evaluation import tasks
from cats.evaluation.distributed import Crew
from cats.evaluation.hflm import Harness


def answer(task: tasks.LoadedTask, harness: Harness, crew: Crew) -> tuple[dict, list[str] | None]:
    """Scores of every document and, of generative tasks, the texts; the documents are shared among the
    processes.
    """
    requests = task.requests
    kind = requests[0].request_type
    mine = [place for place, request in enumerate(requests) if request.doc_id % crew.size == crew.rank]
    if kind == "loglikelihood":
        encode(task, harness)
        found = harness._loglikelihood_tokens([task.encoded[place] for place in mine])
    else:
        found = getattr(harness, kind)([requests[place] for place in mine])
    responses: dict[int, object] = {}
    for part in crew.gather(dict(zip(mine, found, strict=True))):
        responses |= part
    if len(responses) != len(requests):
        raise CatsError(f"{len(responses)} of {len(requests)} requests of {task.name} were answered.")
    ordered = [responses[place] for place in range(len(requests))]
    return tasks.score(task, ordered), ordered if kind == "generate_until" else None


def encode(task: tasks.LoadedTask, harness: Harness) -> None:
    """Turn the requests of a task whose answers are scored into token ids, once for all models."""
    if task.encoded is None and task.requests[0].request_type == "loglikelihood":
        task.encoded = harness.encode(task.requests)


def questions(task: tasks.LoadedTask) -> list[str]:
    """The last paragraph of each prompt, behind its few-shot examples."""
    return [request.args[0].rsplit("\n\n", 1)[-1] for request in task.requests]

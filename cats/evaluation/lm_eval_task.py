"""A task as lm-eval defines it, its documents from the hub or from a local mirror."""

import logging
import os
import random
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import datasets
import lm_eval.api.task
import lm_eval.tasks
import lm_eval.utils
from huggingface_hub import HfApi
from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm.auto import tqdm

from cats.errors import CatsError
from cats.evaluation import docs_cloze
from cats.evaluation.distributed import Processes
from cats.evaluation.mirrors import DATA_DIR, mirror, read_splits
from cats.evaluation.scoring import answer, patched, score, templates_kept
from cats.evaluation.task import Answers
from cats.evaluation.task_list import DOCS_CLOZE, TASKS, names

STOCK = Path(lm_eval.tasks.__file__).resolve().parent
_FEWSHOT_SEED = 1234  # lm-eval's own default
_SPLITS = ("training_split", "validation_split", "test_split")


@dataclass
class LmEvalTask:
    """A task of lm-eval (a `cats.evaluation.task.Task`) with lm-eval's requests for its documents."""

    name: str
    lm_eval: ConfigurableTask
    documents: list[int]
    data: dict
    shots: int
    encoded: list | None = None  # the requests as token ids, kept for the next method

    @property
    def requests(self) -> list:
        return self.lm_eval.instances

    def prepare(self, lm, processes: Processes) -> None:
        """Encode requests whose answers are given; those that are generated are encoded as they come."""
        if self.encoded is None and self.requests[0].request_type == "loglikelihood":
            self.encoded = lm.encode(self.requests)

    def score(self, lm, processes: Processes) -> Answers:
        """By lm-eval's own filters and metrics; texts too where the task is to generate them."""
        self.prepare(lm, processes)
        responses = answer(self.requests, self.encoded, lm, processes)
        scores = score(self.lm_eval, self.requests, responses)
        if self.requests[0].request_type != "generate_until":
            return Answers(scores)
        last = [request.args[0].rsplit("\n\n", 1)[-1] for request in self.requests]
        return Answers(scores, texts=responses, questions=last)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    documents: int | None = None,
    seed: int = 0,
    chat_template: Callable | None = None,
) -> LmEvalTask:
    """Load one task and build lm-eval's requests, prompts and few-shot examples being lm-eval's own.

    Documents come from `data_dir` (default: the environment variable CATS_EVAL_DATA) where it has a folder of
    that name, else from the hub. A copy that differs from the hub's gets another name. `documents` takes a
    seeded draw of that many; `chat_template` renders prompts as a chat (`HFLM.apply_chat_template`).
    Raises CatsError for an unknown task, missing or damaged data, and a missing network.
    """
    name = names([name])[0]
    task = TASKS[name]
    if documents is not None and documents < 1:
        raise CatsError(f"documents={documents} is too few: ask for at least one.")
    folder = mirror(name, data_dir)
    with _quiet(), templates_kept():
        lm_eval_task = _task(name, folder)
        total = len(lm_eval_task.eval_docs)
        chosen = None
        if documents is not None and documents < total:
            chosen = sorted(random.Random(seed).sample(range(total), documents))
        _build(name, lm_eval_task, chosen, chat_template)
    raw = lm_eval_task.dataset[_evaluated(lm_eval_task)]
    title, difference = name, None
    if task.variant and task.variant[1](raw):
        title, _, difference = task.variant
    data = {
        "task": title,
        "version": lm_eval_task.VERSION,
        "source": _source(lm_eval_task),
        "split": _evaluated(lm_eval_task),
        "documents": len(chosen) if chosen else total,
        "of": total,
        "difference": difference,
        "sha256": lm_eval_task.digests,
    }
    return LmEvalTask(
        name=title,
        lm_eval=lm_eval_task,
        documents=chosen or list(range(total)),
        data={**data, "seed": seed} if chosen else data,
        shots=lm_eval_task.config.num_fewshot,
    )


def check(name: str, data_dir: str | os.PathLike | None = None) -> None:
    """Raise CatsError unless the data of a task can be found."""
    for known in names([name]):
        if TASKS[known].yaml is not None and mirror(known, data_dir) is None:
            _ask_hub(known, load_yaml(STOCK / TASKS[known].yaml)["dataset_path"])


class _MirroredTask(ConfigurableTask):
    """lm-eval's task, its documents taken from a folder when `folder` is set; `digests` are the files'
    sha256.
    """

    def __init__(self, config: dict, folder: Path | None):
        self.folder = folder
        self.digests: dict[str, str] = {}
        super().__init__(config=config)

    def download(self, dataset_kwargs=None, **kwargs) -> None:
        if self.config.task == DOCS_CLOZE:
            self.dataset, self.digests = docs_cloze.splits()
        elif self.folder is not None:
            self.dataset, self.digests = read_splits(self.folder)
        else:
            super().download(dataset_kwargs, **kwargs)


def _task(name: str, folder: Path | None) -> _MirroredTask:
    has_yaml = TASKS[name].yaml is not None
    config = load_yaml(STOCK / TASKS[name].yaml) if has_yaml else dict(docs_cloze.CONFIG)
    config.pop("tag", None)
    wanted = config.get("test_split") or config.get("validation_split")
    if folder is None and has_yaml:
        _ask_hub(name, config["dataset_path"])
    elif folder is not None:
        splits = {path.name.split(".")[0] for path in folder.glob("*.jsonl*")}
        needed = [wanted, *([config["fewshot_split"]] if config.get("num_fewshot") else [])]
        for split in needed:
            if split not in splits:
                raise CatsError(f"The mirror of {name} lacks {split}.jsonl or {split}.jsonl.gz in {folder}.")
        for key in _SPLITS:
            if config.get(key) not in splits:
                config[key] = None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        task = _MirroredTask(config, folder)
    except CatsError:
        raise
    except (OSError, ValueError, LookupError, TemplateError) as error:
        where = f"The mirror of {name} in {folder}" if folder else f"The data of {name} on the hub"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise CatsError(f"{where} cannot be read as lm-eval's task expects ({reason}).") from error
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    return task


def _source(task: _MirroredTask) -> str:
    if task.folder is not None:
        return f"mirror {task.folder.name}"
    return task.DATASET_PATH if task.config.task == DOCS_CLOZE else f"hub {task.DATASET_PATH}"


def _evaluated(task: ConfigurableTask) -> str:
    return task.config.test_split or task.config.validation_split


def _build(
    name: str, task: ConfigurableTask, chosen: list[int] | None, chat_template: Callable | None
) -> None:
    """All requests on every process: lm-eval draws few-shot examples in order, so a shard alone would
    differ.
    """
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    options = {"samples": chosen} if chosen else {}
    if chat_template is not None:
        options |= {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": chat_template}
    with patched(lm_eval.api.task, "tqdm", partial(tqdm, desc=f"{name}: prompts", unit="doc", disable=None)):
        task.build_all_requests(**options)


@contextmanager
def _quiet():
    """No progress bars of `datasets` in a log."""
    if sys.stderr.isatty() or not datasets.utils.logging.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@lru_cache
def _ask_hub(name: str, path: str) -> None:
    """One short question to the hub: `load_dataset` retries for minutes without network."""
    try:
        HfApi().dataset_info(path, timeout=10)
    except Exception as error:  # each version of huggingface_hub brings its own HTTP client and its errors
        cache = Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___").lower()
        if not cache.is_dir():
            raise CatsError(
                f"The data of {name} ({path}) is neither in a local mirror nor can the hub be reached: "
                f"connect, or name a folder of mirrors with --data-dir or {DATA_DIR}."
            ) from error

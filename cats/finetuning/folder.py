"""What a comparison keeps on disk: a lock, and of each run its result and its model."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cats import paths
from cats.errors import CatsError
from cats.evaluation.distributed import Processes
from cats.finetuning.checkpoints import read_note, write_note
from cats.finetuning.recipe import Recipe
from cats.finetuning.run import Trained, save
from cats.records.origin import Origin

_RESULT, _MODEL, _ORIGINS = "result.json", "model", "origins.json"


@contextmanager
def alone(folder: Path, processes: Processes) -> Iterator[None]:
    """The folder for the processes of this command; CatsError where another command trains in it.

    The lock ends with the process that holds it, however that ends.
    """
    lock = FileLock(paths.made(folder) / ".lock", blocking=False)
    free = True
    if processes.leads:
        try:
            lock.acquire()
        except Timeout:
            free = False
    if not processes.agree(free):
        raise CatsError(
            f"Another `cats finetune` trains in {folder}: wait for its end, or name another output."
        )
    try:
        yield
    finally:
        lock.release()


def result(folder: Path, recipe: Recipe, *, model: bool) -> dict:
    """What a finished run of at least the recipe's steps noted; {} where something asked is not there.

    `model`: its model is asked for too. Raises CatsError where the model of a longer run was not kept.
    """
    found = read_note(folder / _RESULT)
    if not found or found["steps"] < recipe.steps:
        return {}
    if not model or (found["model_steps"] == found["steps"] and (folder / _MODEL).is_dir()):
        return found
    if found["steps"] > recipe.steps:
        raise CatsError(
            f"{folder.name} has {found['steps']} steps behind it and its model was not kept: save it at "
            f"{found['steps']} steps, or name another output."
        )
    return {}


def origins(folder: Path, own: Origin, processes: Processes) -> list[Origin]:
    """Those of all the runs that a curve took, the one that ends here behind the earlier ones; kept."""
    runs = [*read_note(folder / _ORIGINS).get("runs", []), own]
    if processes.leads:
        write_note(folder / _ORIGINS, {"runs": runs})
    return runs


def keep(
    folder: Path, recipe: Recipe, trained: Trained, tokenizer, *, model: bool, origins: list[Origin]
) -> dict:
    """Keep the model where it is asked for, then note the run as finished; returns the note."""
    if model:
        temporary, former = (folder / f".{name}-{os.getpid()}.tmp" for name in (_MODEL, "former"))
        try:
            save(trained, recipe, tokenizer, temporary)
            if (folder / _MODEL).exists():
                os.replace(folder / _MODEL, former)
            os.replace(temporary, folder / _MODEL)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)
    found = {
        "steps": recipe.steps,
        "model_steps": recipe.steps if model else None,
        "points": trained.points,
        "after": trained.after,
        "origins": origins,
    }
    write_note(folder / _RESULT, found)
    return found

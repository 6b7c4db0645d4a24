"""Run the methods of a comparison one after the other, go on after an interruption, and record the curves."""

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from cats import paths
from cats.errors import CatsError
from cats.evaluation.distributed import Processes
from cats.finetuning import folder as folders
from cats.finetuning import table
from cats.finetuning.inputs import Inputs
from cats.finetuning.plan import Comparison
from cats.finetuning.recipe import Recipe
from cats.finetuning.run import finetune
from cats.records import origin
from cats.records import record as records


def execute(
    wanted: Sequence[Comparison],
    output: Path,
    *,
    processes: Processes,
    minutes: float | None = None,
    records_folder: Path | None = None,
) -> bool:
    """Run what is left, for `minutes` at most, and record each comparison; returns whether all is done.

    Runs have folders of their own below `output`, and go on from their last checkpoint. Raises CatsError
    where another command trains in one of them, and as `finetune`.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    if any(each.device == "cuda" for each in wanted) and not torch.cuda.is_available():
        raise CatsError("The plan is for a GPU and PyTorch sees none here: set its device to cpu.")
    complete = True
    for each in wanted:
        folder = output / each.record
        with folders.alone(folder, processes):
            done, about = _run_all(each, folder, processes, deadline)
            complete = complete and len(done) == len(each.recipes)
            place = records_folder or output
            if processes.leads and done and not table.recorded(each, done, place):
                path = table.record(each, done, about, place)
                runs = [found["after"] for _, found in done]
                print(*table.ends(table.rows(each.model, done), runs), f"Wrote {path}", sep="\n")
    return complete


def here(each: Comparison, folder: Path) -> records.Record:
    """Run one comparison now, to its end, and return its record, in `folder`: the live half of a chapter."""
    processes = Processes(0, 1, each.device)
    with folders.alone(folder / each.record, processes):
        done, about = _run_all(each, folder / each.record, processes, None)
    table.record(each, done, about, folder)
    return records.read("finetuning", folder=folder, slug=each.record)


def _run_all(
    each: Comparison, folder: Path, processes: Processes, deadline: float | None
) -> tuple[list, dict]:
    """Finished runs as (recipe, result), and what a record says about model and data."""
    done: list[tuple[Recipe, dict]] = []
    inputs = Inputs(each, folder, processes)
    for number, recipe in enumerate(each.recipes, 1):
        place = paths.made(folder / recipe.slug)
        known = processes.gather(folders.result(place, recipe, model=each.save))[0]
        if known:
            done.append((recipe, known))
            continue
        left = None if deadline is None else (deadline - time.monotonic()) / 60
        if left is not None and processes.agree(left <= 0):
            break
        if processes.leads:
            until = "" if left is None else f", {left:.1f} minutes left for this call"
            tqdm.write(
                f"{each.record}: run {number} of {len(each.recipes)}, {recipe.slug}{until}", file=sys.stderr
            )
        loaded = inputs.loaded(recipe)
        inputs.about(recipe)
        begun, own = time.perf_counter(), origin.begin(seed=recipe.seed)
        trained = finetune(
            loaded,
            recipe,
            inputs.text(recipe),
            place,
            fit=inputs.fit(recipe),
            calibration=inputs.batches(recipe, recipe.recalibrate) if recipe.sparse else None,
            device=each.device,
            processes=processes.size,
            minutes=left,
            zero_shot=_zero_shot(each, loaded.tokenizer, recipe, processes),
        )
        runs = folders.origins(place, origin.ended(own, time.perf_counter() - begun), processes)
        if not trained.finished:
            break
        if processes.leads:
            known = folders.keep(place, recipe, trained, loaded.tokenizer, model=each.save, origins=runs)
        done.append((recipe, known))
        del trained
        gc.collect()  # a trainer refers to itself: its weights would be there while the next run is measured
    return done, inputs.about(done[0][0]) if done else {}


def _zero_shot(each: Comparison, tokenizer, recipe: Recipe, processes: Processes):
    """What measures a model on the comparison's tasks; None where it has none."""
    if not each.zero_shot:
        return None
    return zero_shot(
        tokenizer,
        each.zero_shot.get("tasks", ["paper"]),
        documents=each.zero_shot.get("documents"),
        data_dir=each.data_dir,
        processes=processes,
        bf16=recipe.dtype == "bfloat16",
    )


def zero_shot(
    tokenizer,
    names: Sequence[str],
    *,
    documents: int | None,
    data_dir: str | None,
    processes: Processes,
    bf16: bool,
):
    """A function of a model, sparse or dense, with adapters or not: its mean accuracy over tasks."""
    from cats.criteria.masking import Masking
    from cats.evaluation import tasks  # lm-eval, which only some comparisons need
    from cats.evaluation.hflm import MaskedHFLM
    from cats.evaluation.intervals import summarise

    listed = tasks.names(list(names))
    tasks.check(listed, data_dir)
    loaded = [tasks.load(name, data_dir=data_dir, documents=documents, seed=0) for name in listed]

    def measure(model: nn.Module) -> float:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        scores = []
        with Masking(model) as masking, torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            lm = MaskedHFLM(model, tokenizer, masking=masking)
            for task in loaded:
                lm.label = task.name
                scores.append(summarise(task.score(lm, processes).scores)["acc"])
        return sum(scores) / len(scores)

    return measure

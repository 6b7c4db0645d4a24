"""Run the methods of a comparison one after the other, go on after an interruption, and record the curves."""

import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from cats import criteria
from cats.core.thresholds import write_atomically
from cats.corpora import corpus as corpora
from cats.corpora import sampled as sampling
from cats.errors import CatsError
from cats.evaluation.distributed import Processes
from cats.finetuning import data, measure, table
from cats.finetuning.plan import CALIBRATION, Comparison
from cats.finetuning.recipe import Recipe
from cats.finetuning.run import finetune, save
from cats.models import load as models
from cats.records import record as records

_RESULT = "outcome.json"


def execute(
    wanted: Sequence[Comparison],
    output: Path,
    *,
    crew: Processes,
    minutes: float | None = None,
    records_folder: Path | None = None,
) -> bool:
    """Run what is left, for `minutes` at most, and record each comparison; returns whether all is done.

    Runs have folders of their own below `output`, and go on from their last checkpoint.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    if any(each.device == "cuda" for each in wanted) and not torch.cuda.is_available():
        raise CatsError("The plan is for a GPU and PyTorch sees none here: set its device to cpu.")
    complete = True
    for each in wanted:
        started = time.time()
        folder = output / each.record
        done, info = _run_all(each, folder, crew, deadline)
        complete = complete and len(done) == len(each.recipes)
        stamp = folder / f"recorded-{len(done)}-of-{each.recipes[0].steps}-steps"
        if crew.leads and done and not stamp.exists():
            path = table.record(each, done, info, started, records_folder or output)
            runs = [found["after"] for _, found in done]
            print(*table.ends(table.rows(each.model, done), runs), f"Wrote {path}", sep="\n")
            stamp.touch()
    return complete


def here(each: Comparison, folder: Path) -> records.Record:
    """Run one comparison now, to its end, and return its record, in `folder`: the live half of a chapter."""
    started = time.time()
    done, info = _run_all(each, folder / each.record, Processes(0, 1, each.device), None)
    table.record(each, done, info, started, folder)
    return records.read("finetuning", folder=folder, slug=each.record)


def _run_all(each: Comparison, folder: Path, crew: Processes, deadline: float | None) -> tuple[list, dict]:
    """Finished runs as (recipe, result), and what a record says about model and data."""
    done: list[tuple[Recipe, dict]] = []
    loaded = texts = None
    fits: dict = {}
    note = folder / "data.json"
    folder.mkdir(parents=True, exist_ok=True)
    for number, recipe in enumerate(each.recipes, 1):
        result = folder / recipe.slug / _RESULT
        if crew.agree(_finished(result, recipe)):
            done.append((recipe, json.loads(result.read_text())))
            continue
        left = None if deadline is None else (deadline - time.monotonic()) / 60
        if left is not None and crew.agree(left <= 0):
            break
        if crew.leads:
            until = "" if left is None else f", {left:.1f} minutes left for this call"
            tqdm.write(
                f"{each.record}: run {number} of {len(each.recipes)}, {recipe.slug}{until}", file=sys.stderr
            )
        if loaded is None:
            loaded = models.load(each.model, dtype=recipe.dtype)
            if loaded.tokenizer is None:
                raise CatsError(f"{each.model} has no tokenizer, so it reads no text: name another model.")
            texts = _Texts(each, loaded, folder, crew)
            info = {"model": loaded.info, "data": texts.of(recipe).info}
            if crew.leads:
                write_atomically(note, json.dumps(info).encode())
        text = texts.of(recipe)
        fit, batches = _fit(each, recipe, loaded, fits)
        outcome = finetune(
            loaded,
            recipe,
            text,
            folder / recipe.slug,
            fit=fit,
            calibration=batches,
            device=each.device,
            processes=crew.size,
            minutes=left,
            zero_shot=_tasks(each, loaded, recipe, crew),
        )
        if not outcome.finished:
            break
        if crew.leads:
            found = {"steps": recipe.steps, "points": outcome.points, "after": outcome.after}
            write_atomically(result, json.dumps(found).encode())
            if each.save:
                save(outcome, recipe, loaded.tokenizer, folder / recipe.slug / "model")
            done.append((recipe, found))
        else:
            done.append((recipe, {}))
        del outcome
        gc.collect()  # a trainer refers to itself: its weights would be there while the next run is measured
    known = json.loads(note.read_text()) if crew.leads and note.is_file() else {}
    return done, known


def _finished(result: Path, recipe: Recipe) -> bool:
    return result.is_file() and json.loads(result.read_text())["steps"] >= recipe.steps


class _Texts:
    """The rows of each seed, made once; text sampled from the model is written first."""

    def __init__(self, each: Comparison, loaded: models.LoadedModel, folder: Path, crew: Processes):
        self.each, self.loaded, self.crew = each, loaded, crew
        self.folder = folder
        self._made: dict = {}

    def of(self, recipe: Recipe) -> data.TrainingText:
        if recipe.seed not in self._made:
            name, about = self.each.train, {}
            if name.startswith(sampling.SAMPLED):
                name, about = self._sampled(name, recipe)
            self._made[recipe.seed] = data.load(
                name,
                self.each.heldout,
                self.loaded.tokenizer,
                rows=max(1, recipe.steps * recipe.batch),
                sequence_length=recipe.sequence_length,
                seed=recipe.seed,
                heldout_rows=self.each.heldout_rows,
                documents=self.each.documents,
                data_dir=self.each.data_dir,
            )
            self._made[recipe.seed].info["train"] |= about
        return self._made[recipe.seed]

    def _sampled(self, name: str, recipe: Recipe) -> tuple[str, dict]:
        count = sampling.number(name)

        def write() -> tuple[Path, dict]:
            with _on(self.loaded, self.each.device):
                return sampling.sampled(self.loaded, count, recipe.sequence_length, self.folder.parent)

        path, about = self.crew.leading(write)
        return str(path), about


@contextmanager
def _on(loaded: models.LoadedModel, device: str) -> Iterator[None]:
    """A pristine model on the device for a while, and back in memory."""
    loaded.model.to(device)
    try:
        yield
    finally:
        loaded.model.to("cpu")


def _fit(each: Comparison, recipe: Recipe, loaded: models.LoadedModel, fits: dict):
    """The rule calibrated on the pristine model, and batches to `recalibrate` on; None where not asked."""
    if not recipe.sparse:
        return None, None
    given = CALIBRATION | each.calibration

    def batches(tokens: int) -> corpora.Batches:
        key = ("batches", tokens)
        if key not in fits:
            corpus = _corpus(given["corpus"], given["split"], each.data_dir)
            length = given["sequence_length"]
            fits[key] = corpora.batches(corpus, loaded.tokenizer, tokens=tokens, sequence_length=length)
        return fits[key]

    if recipe.rule not in fits:
        if recipe.rule == "cats" and each.thresholds:
            fits["cats"] = criteria.Fit("cats", each.load_thresholds())
        else:
            text = batches(given["tokens"])
            with _on(loaded, each.device):
                source = {"model": loaded.info, **text.info}
                fits[recipe.rule] = criteria.rule(recipe.rule).calibrate(loaded.model, text, source=source)
    return fits[recipe.rule], batches(recipe.recalibrate) if recipe.recalibrate else None


def _corpus(name: str, split: str, data_dir: str | None) -> corpora.Corpus:
    """Text to calibrate on: a corpus, or the instructions of a task with their responses."""
    if not data.is_instructions(name):
        return corpora.load(name, split=split)
    found, about = data.examples(name, split, data_dir)
    return corpora.Corpus(name, split, [each.prompt + each.response for each in found], about)


def _tasks(each: Comparison, loaded: models.LoadedModel, recipe: Recipe, crew: Processes):
    if not each.zero_shot:
        return None
    return measure.zero_shot(
        loaded.tokenizer,
        each.zero_shot.get("tasks", ["paper"]),
        documents=each.zero_shot.get("documents"),
        data_dir=each.data_dir,
        crew=crew,
        bf16=recipe.dtype == "bfloat16",
    )

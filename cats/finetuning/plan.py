"""A comparison of methods that are fine-tuned alike, from a YAML plan or the command line."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import torch
from transformers import AutoModelForCausalLM

from cats import corpora, paths
from cats.core.accounting import account
from cats.core.thresholds import Thresholds
from cats.corpora import sampled
from cats.corpora.readers import HUB, LOCAL
from cats.errors import CatsError
from cats.evaluation import plan_file
from cats.finetuning import data
from cats.finetuning.recipe import MOST, Recipe
from cats.models import load as models

_RECIPE = {field.name for field in dataclasses.fields(Recipe)} - {"rule", "sparsity", "seed"}
CALIBRATION = {"corpus": corpora.DEFAULT, "split": "train", "tokens": 60_000, "sequence_length": 512}
_INNER = {
    "calibration": {key: type(value) for key, value in CALIBRATION.items()},
    "zero_shot": {"tasks": list[str], "documents": int | None},
}


@dataclass(frozen=True)
class Comparison:
    """One model under several methods and seeds on one text; `record` is the slug of the record.

    `heldout_split`: "test", or "all" of a corpus from which nothing else is read. `calibration`: {corpus,
    split, tokens, sequence_length}, of a corpus or a task; `thresholds`: for cats, a file in its place.
    `zero_shot`: {tasks, documents}, measured on the grid; `save` keeps each run's model beside its curve.
    """

    model: str
    record: str
    recipes: list[Recipe]
    train: str = "package-docs"
    heldout: str = "shakespeare"
    heldout_rows: int = 64
    heldout_split: str = "test"
    documents: int | None = None
    device: str = "cuda"
    data_dir: str | None = None
    calibration: dict = field(default_factory=dict)
    thresholds: str | None = None
    zero_shot: dict = field(default_factory=dict)
    save: bool = False

    def __post_init__(self):
        counts = {name: getattr(self, name) for name in ("heldout_rows", "documents")}
        counts |= {
            f"calibration {name}": self.calibration.get(name) for name in ("tokens", "sequence_length")
        }
        counts |= {"zero_shot documents": self.zero_shot.get("documents")}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise CatsError(f"{name}={value} is too small: use 1 or more.")
            if value is not None and value > MOST:
                raise CatsError(f"{name} is more than {MOST:,}: use less.")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", self.record):
            raise CatsError(
                f"The record name {self.record[:100]!r} may have lower-case letters, digits, '.', '_' and "
                "'-' only, 100 at most: choose another."
            )

    def load_thresholds(self) -> Thresholds:
        """Those of `thresholds`, a path from here or from the clone; errors as `Thresholds.load`."""
        path = Path(self.thresholds)
        shipped = paths.ROOT / path
        thresholds = Thresholds.load(shipped if shipped.is_file() and not path.is_file() else path)
        if thresholds.rule != "cats":
            raise CatsError(
                f"The thresholds {self.thresholds} are for the rule {thresholds.rule}: fine-tuning takes a "
                "file for cats, and calibrates other rules itself."
            )
        return thresholds

    def __str__(self) -> str:
        one = self.recipes[0]
        methods = dict.fromkeys(recipe.method for recipe in self.recipes)
        seeds = {recipe.seed for recipe in self.recipes}
        return (
            f"{self.record}: {self.model}, {{{', '.join(methods)}}} x {len(seeds)} "
            f"seed{'s' * (len(seeds) > 1)}, {one.steps} step{'s' * (one.steps != 1)} "
            f"of {one.batch} rows x {one.sequence_length} tokens of {self.train}, held out {self.heldout}"
        )


def read(path: Path, *, device: str | None = None, data_dir: str | None = None) -> list[Comparison]:
    """The comparisons of a plan file. Raises CatsError for anything unknown in it."""
    over = {key: value for key, value in {"device": device, "data_dir": data_dir}.items() if value}
    runs = plan_file.runs(path, "model, record and methods")
    return [comparison({**run, **over}, path.name) for run in runs]


def comparison(given: dict, where: str) -> Comparison:
    """A comparison from plain values: its own, `methods`, `seeds`, and those of `Recipe`."""
    own = {each.name for each in dataclasses.fields(Comparison)} - {"recipes"}
    types = {**get_type_hints(Comparison), **get_type_hints(Recipe), "grid": int | tuple[int, ...]}
    types = {key: types[key] for key in own | _RECIPE} | {"methods": list[str | dict], "seeds": list[int]}
    plan_file.check(given, types, where)
    for name, kinds in _INNER.items():
        plan_file.check(given.get(name, {}), kinds, f"the {name} of {where}")
    empty = [key for key, value in given.items() if value == "" and key != "best"]
    if empty:
        raise CatsError(f"{empty[0]} in {where} is empty: give it a value, or leave it out.")
    missing = [key for key in ("model", "record", "methods") if not given.get(key)]
    if missing:
        raise CatsError(f"A run in {where} lacks {missing[0]}: give model, record and methods.")
    settings = {key: given[key] for key in _RECIPE & set(given)}
    recipes = [
        Recipe(rule=rule, sparsity=level, seed=seed, **settings)
        for seed in given.get("seeds", [0])
        for method in given["methods"]
        for rule, level in _levels(method, where)
    ]
    if len({recipe.slug for recipe in recipes}) < len(recipes):
        raise CatsError(f"A run in {where} names a method twice: name each once.")
    return Comparison(recipes=recipes, **{key: given[key] for key in own & set(given)})


def shipped_thresholds(model: str, *, tokens: int) -> dict:
    """`thresholds`, those shipped for a model, or `calibration` on as many tokens of the default text."""
    shipped = paths.THRESHOLDS / f"{model}.json"
    return {"thresholds": str(shipped)} if shipped.is_file() else {"calibration": {"tokens": tokens}}


def _levels(method: str | dict, where: str) -> list[tuple[str, float | None]]:
    """ "dense", "cats:0.5" or {"cats": [0.5, 0.7]}."""
    if isinstance(method, dict) and len(method) == 1 and isinstance(*method, str):
        ((rule, levels),) = method.items()
        return [(rule, level) for level in (levels if isinstance(levels, list) else [levels])]
    if not isinstance(method, str):
        raise CatsError(f"A method in {where} is a name, or a name with sparsities, not {method!r}.")
    rule, _, level = method.partition(":")
    try:
        return [(rule, float(level) if level else None)]
    except ValueError as error:
        raise CatsError(f"The method {method!r} in {where} has no number after its colon.") from error


def check(wanted: Sequence[Comparison]) -> list[str]:
    """What a dry run finds, a line a comparison. Loads no weights. Raises CatsError as `execute` would."""
    lines = []
    for each in wanted:
        if each.device not in ("cpu", "cuda"):
            raise CatsError(f"{each.device} cannot be trained on here: use cpu or cuda.")
        config = models.config(each.model)
        account(config)
        for name in (each.train, each.heldout, each.calibration.get("corpus", corpora.DEFAULT)):
            _check_text(name, each)
        if each.heldout_split not in corpora.SPLITS or each.heldout_split == "train":
            raise CatsError(f"heldout_split {each.heldout_split!r} is neither test nor all: use one of them.")
        if each.zero_shot:
            from cats.evaluation import tasks  # lm-eval, which only some comparisons need

            tasks.check(tasks.names(each.zero_shot.get("tasks", ["paper"])), each.data_dir)
        if each.thresholds:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config.get_text_config())
            each.load_thresholds().check(model, weights=False)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        for recipe in each.recipes:
            if limit and recipe.sequence_length > limit:
                raise CatsError(
                    f"sequence_length={recipe.sequence_length} is more than {each.model} can read: use "
                    f"{limit} or less."
                )
            recipe.accumulation(1, instructions=data.is_instructions(each.train))
            if recipe.best == "accuracy" and not data.is_instructions(each.train):
                raise CatsError(
                    f"best accuracy needs answers, and {each.train} has none: train on task:<name>, or keep "
                    "the best loss."
                )
        recipe = each.recipes[0]
        tokens = recipe.steps * recipe.batch * recipe.sequence_length
        lines.append(
            f"{each}; {tokens:,} tokens a run, {len(each.recipes)} run{'s' * (len(each.recipes) > 1)}"
        )
    return lines


def _check_text(name: str, each: Comparison) -> None:
    """CatsError for an unknown text or a missing file; a corpus by name is not read for it."""
    if data.is_instructions(name):
        data.examples(name, "validation" if name == each.heldout else "train", each.data_dir)
    elif name == each.train and name.startswith(sampled.SAMPLED):
        sampled.number(name)
    elif name not in {*LOCAL, *HUB}:
        corpora.load(name, split="all")

"""One fine-tuning run: from a pristine model to a curve of held-out loss and a model that can be saved."""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cats import paths
from cats.calibration.calibrate import calibrate
from cats.core.centred import CentredMLP
from cats.core.sparsify import set_thresholds
from cats.core.structure import sparse_mlps
from cats.core.thresholds import Thresholds
from cats.criteria import Fit, ThresholdFit
from cats.errors import CatsError
from cats.finetuning.adapt import (
    Teacher,
    adapt,
    apply,
    as_relu,
    compiled_layers,
    merged,
    note_sparsity,
)
from cats.finetuning.arguments import arguments
from cats.finetuning.callbacks import HELDOUT, INDOMAIN, Grid
from cats.finetuning.checkpoints import (
    last_checkpoint,
    read_note,
    reason,
    strangers,
    sweep,
    with_best,
    write_note,
)
from cats.finetuning.data import TrainingText
from cats.finetuning.learned import Anneal, LearnedThresholds
from cats.finetuning.recipe import Recipe
from cats.finetuning.trainer import CatsTrainer
from cats.models.load import LoadedModel, quiet_unless_terminal

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_SHARDED = (
    ("VERSION", "2", "the first one is not tested here"),
    ("STATE_DICT_TYPE", "FULL_STATE_DICT", "the model is put together at the end"),
    ("CPU_RAM_EFFICIENT_LOADING", "false", "every process loads the model, with its thresholds"),
)
_GROWS = ("train_rows", "train_tokens", "train_sha256", "passes_begun")  # with the number of steps


@dataclass
class Trained:
    """A run: `points` of its curve, what was measured `after` it, the `model` merged; `finished` or not."""

    points: list[dict]
    after: dict
    model: nn.Module | None
    finished: bool


def finetune(
    loaded: LoadedModel,
    recipe: Recipe,
    text: TrainingText,
    folder: Path,
    *,
    fit: Fit | None = None,
    calibration=None,
    device: str = "cpu",
    processes: int = 1,
    minutes: float | None = None,
    zero_shot=None,
) -> Trained:
    """Train a copy of `loaded.model`, which is left dense and as it was, in `folder`.

    `fit`: the rule calibrated on that model, None for a dense run; `calibration`: batches for `recalibrate`.
    A checkpoint found in the folder is gone on from, to the curve of an uninterrupted run. After `minutes`
    the run stops, unfinished, with a checkpoint. Raises CatsError for another run in the folder, too little
    memory and a loss that is not finite; the last whole checkpoint stays.
    """
    instructions = text.info["loss"] == "response only"
    if recipe.best == "accuracy" and not text.answers:
        raise CatsError(
            f"best accuracy needs a few answers to choose between, and {text.info['train']['name']} has "
            "none: keep the best loss."
        )
    accumulation = recipe.accumulation(processes, instructions=instructions)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded:
        _check_sharded(recipe)
    identity = _claim(folder, recipe, text, loaded.info)
    begin = last_checkpoint(folder, processes) if recipe.steps else None
    model = copy.deepcopy(loaded.model)
    if recipe.tuning == "full" or sharded:  # FSDP wants one dtype, that of the adapters
        model.float()  # 16 bits would lose updates of 1e-5; autocast computes in bf16 all the same
    teacher = Teacher(model, recipe) if recipe.distil else None
    model = adapt(apply(model, recipe, fit, "cpu" if sharded else device), recipe)
    anneal = learned = None
    if recipe.sparse and recipe.anneal:
        anneal = Anneal(model, fit, recipe.sparsity, recipe.anneal, recipe.steps)
    if recipe.sparse and recipe.learn_thresholds:
        learned = LearnedThresholds(model, fit.thresholds, recipe.sparsity)
        model.add_module("learned", learned)
    args = arguments(recipe, folder, on_cpu=device == "cpu", accumulation=accumulation)
    args.eval_on_start = begin is None
    pad = loaded.tokenizer.pad_token_id or 0
    trainer = CatsTrainer(
        model, recipe, text, args, pad=pad, teacher=teacher, anneal=anneal, learned=learned, minutes=minutes
    )
    trainer.identity, trainer.zero_shot = identity, zero_shot
    trainer.accelerator.wait_for_everyone()  # every process has found where to begin
    if trainer.args.should_save and recipe.steps:
        sweep(folder, with_best(begin) if begin else set())
    compiling = compiled_layers(trainer.accelerator.state) if recipe.compile else nullcontext()
    with _said(recipe, trainer, folder), compiling:
        if recipe.steps:
            trainer.train(resume_from_checkpoint=str(begin) if begin else None)
        else:
            trainer.evaluate()
    points = _points(trainer.state.log_history, accumulation * recipe.rows_at_once * processes)
    if trainer.state.global_step < recipe.steps:
        return Trained(points, {}, None, False)
    after = {"method": recipe.method, "seed": recipe.seed, "trainable_parameters": _trainable(trainer.model)}
    if trainer.step_seconds:
        after["step_s"] = float(np.median(trainer.step_seconds))
    if trainer.peak_bytes:
        after["peak_memory_gb"] = trainer.peak_bytes / 1e9
    trainer.settle()
    if learned is not None:
        del model.learned
    final = merged(_whole(trainer, loaded, recipe, fit, folder))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save and recipe.steps:
        sweep(folder, with_best(folder / f"checkpoint-{trainer.state.global_step}"))
    thresholds = fit.thresholds if isinstance(fit, ThresholdFit) else None
    if thresholds is not None:
        after["sparsity_by_layer"] = [module.sparsity for module in sparse_mlps(final)]
        note_sparsity(final, fit)
    if recipe.sparse and recipe.recalibrate and (thresholds is not None or recipe.rule == "centred"):
        after |= _recalibrated(final, recipe, thresholds, text, args, pad, calibration)
    return Trained(points, after, final, True)


def save(trained: Trained, recipe: Recipe, tokenizer, folder: Path) -> None:
    """Write the model where `from_pretrained` reads it: dense, sparse through CatsConfig, or with ReLU.

    Raises CatsError where it cannot be written.
    """
    model = as_relu(trained.model) if recipe.rule == "relufication" else trained.model
    try:
        with quiet_unless_terminal():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CatsError(
            f"The model cannot be written to {folder.parent} ({reason(error)}): make room, and the same "
            "command goes on."
        ) from error


def _recalibrated(model, recipe: Recipe, known: Thresholds | None, text: TrainingText, args, pad, batches):
    """Thresholds estimated once more on the trained model as it computes, with its masks: their drift, each
    over the one trained with, minus 1, and the held-out loss with them. `known`: those so far; None for
    `centred`, where a layer's are all scaled by one factor."""
    modules = sparse_mlps(model)
    centred = [module for module in modules if isinstance(module, CentredMLP)]
    before = torch.stack([module.threshold.clone() for module in modules])
    targets = [module.sparsity for module in modules]
    if known is None:
        per, weights = "layer", 1 / before.clamp(min=torch.finfo(before.dtype).tiny)
    else:
        per, weights = "layer" if known.values.ndim == 2 else "neuron", known.scale
    for module in centred:
        module.unfold()
    found = calibrate(model, batches, per=per, weights=weights)
    shares = [target + module.overhead for target, module in zip(targets, modules, strict=True)]
    renewed = found.at(shares).to(before.device)
    drift = torch.where(before > 0, renewed / before - 1, 0.0).reshape(len(modules), -1).mean(1)
    set_thresholds(modules, renewed, targets)
    trainer = CatsTrainer(model, recipe, text, args, pad=pad)
    trainer.remove_callback(Grid)  # it would report another step zero
    trainer.evaluate()
    trainer.settle()
    for module in centred:
        module.fold()
    [point] = _points(trainer.state.log_history, 0)
    return {"threshold_drift": drift.tolist(), "recalibrated": point, "recalibrated_on_tokens": found.tokens}


def _points(history: list[dict], rows_a_step: int) -> list[dict]:
    """The curve: one dict for each step that was measured, from Trainer's log."""
    found: dict[int, dict] = {}
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    for entry in history:
        step = entry["step"]
        point = found.setdefault(step, {"step": step})
        for prefix in (HELDOUT, INDOMAIN):
            for key in ("nll", "realised", "accuracy", "rows"):
                if f"eval_{prefix}_{key}" in entry:
                    point[f"{prefix}_{key}"] = entry[f"eval_{prefix}_{key}"]
        if "zero_shot" in entry:
            point["zero_shot"] = entry["zero_shot"]
    curve = [found[step] for step in sorted(found) if f"{HELDOUT}_nll" in found[step]]
    before = 0
    for point in curve:
        between = [losses[step] for step in range(before + 1, point["step"] + 1) if step in losses]
        point["train_loss"] = float(np.mean(between)) if between else None
        point["rows_trained"] = point["step"] * rows_a_step
        before = point["step"]
    return curve


def _claim(folder: Path, recipe: Recipe, text: TrainingText, model: dict) -> dict:
    """Note what runs in a folder and return it; raises CatsError where that was something else.

    At a constant rate and without a schedule a longer run goes on from a shorter one.
    """
    settings = recipe.describe() | {"method": recipe.method, "seed": recipe.seed}
    grows = recipe.schedule == "constant" and not recipe.anneal
    for name in ("grid", "save_every", "recalibrate", *(["steps"] if grows else [])):
        del settings[name]
    source = {key: value for key, value in text.info.items() if key not in _GROWS}
    known = json.loads(json.dumps({"recipe": settings, "text": source, "model": model}))
    note = paths.made(folder) / "run.json"
    found = read_note(note)
    if not found:
        if others := strangers(folder, known):
            raise CatsError(
                f"{folder.name} has no readable run.json and {others[0].name} of another run: use another "
                "output, or remove it."
            )
        write_note(note, known)
        return known
    differs = [
        f"{part} {key}"
        for part in known
        for key in known[part]
        if found.get(part, {}).get(key) != known[part][key]
    ]
    if differs:
        raise CatsError(
            f"{folder.name} holds a run that differs in {differs[0]}: use another output, or remove it."
        )
    return known


@contextmanager
def _said(recipe: Recipe, trainer: CatsTrainer, folder: Path) -> Iterator[None]:
    """Too little memory is said in one sentence, with what is kept; Trainer's chatter is left out."""
    try:
        with quiet_unless_terminal(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's calls of what Transformers renamed
            warnings.filterwarnings("ignore", "TensorFloat32")  # said of every graph; autocast multiplies
            yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error).lower() for sign in _OUT_OF_MEMORY):
            raise
        kept = last_checkpoint(folder, trainer.args.world_size)
        raise CatsError(
            f"Memory ran out at step {trainer.state.global_step + 1} with {recipe.rows_at_once} rows of "
            f"{recipe.sequence_length} tokens at once: lower rows_at_once or sequence_length, or turn "
            f"checkpointing on ({f'{kept.name} is kept' if kept else 'there is no checkpoint yet'})."
        ) from error


def _whole(trainer: CatsTrainer, loaded: LoadedModel, recipe: Recipe, fit: Fit | None, folder: Path):
    """The trained model in one piece, on this process."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model)
    gathered = folder / "gathered"
    trainer.save_model(str(gathered))
    trainer.accelerator.wait_for_everyone()
    model = adapt(apply(copy.deepcopy(loaded.model), recipe, fit), recipe)
    if recipe.tuning == "lora":
        model.load_adapter(str(gathered), "default")
    else:
        for file in sorted(gathered.glob("*.safetensors")):
            model.load_state_dict(load_file(file), strict=False)
    return model.to(trainer.args.device)


def _check_sharded(recipe: Recipe) -> None:
    """Raise CatsError for what FSDP, which splits every weight over the GPUs, does not go with here."""
    if recipe.distil or recipe.learn_thresholds:
        raise CatsError("distil and learn_thresholds run on one GPU or under DDP: leave them out with FSDP.")
    for name, value, why in _SHARDED:
        if os.environ.get(f"FSDP_{name}", "").lower() != value.lower():
            raise CatsError(f"Set fsdp_{name.lower()} to {value}: {why}.")


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

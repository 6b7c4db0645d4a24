"""A recipe in the words of Transformers' Trainer."""

import sys
from pathlib import Path

from transformers import TrainingArguments

from cats.finetuning.callbacks import INDOMAIN
from cats.finetuning.recipe import Recipe


def arguments(recipe: Recipe, folder: Path, *, on_cpu: bool, accumulation: int) -> TrainingArguments:
    """The recipe in Trainer's words; checkpoints go to `folder`, the two newest are kept, and the best."""
    never = max(recipe.steps, 1)  # saving and measuring happen where `Grid` says, and at the last step
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=never,
        per_device_train_batch_size=recipe.rows_at_once,
        per_device_eval_batch_size=max(recipe.rows_at_once, 4),
        gradient_accumulation_steps=accumulation,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule,
        weight_decay=recipe.weight_decay,
        bf16=recipe.dtype == "bfloat16",
        **_checkpointing(recipe.checkpointing),
        train_sampling_strategy="sequential",  # the rows come in the order of the seed already
        eval_strategy="steps",
        eval_steps=never,
        save_strategy="steps",
        save_steps=never,
        save_total_limit=2,
        load_best_model_at_end=bool(recipe.best),
        metric_for_best_model=f"eval_{INDOMAIN}_{recipe.best}" if recipe.best else None,
        greater_is_better=recipe.best == "accuracy" and not recipe.reference_sign,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss ends the run, see `training_step`
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        seed=recipe.seed,
    )


def _checkpointing(on: bool) -> dict:
    """Activations recomputed in the backward pass, by the name that this version of Transformers has."""
    newer = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {}

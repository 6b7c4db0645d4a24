"""Transformers' Trainer with the mask on: held-out loss on a grid of steps, and distillation."""

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cats.calibration.observe import SparsityMeter
from cats.core import compilation
from cats.core.structure import sparse_mlps
from cats.errors import CatsError
from cats.finetuning import autograd
from cats.finetuning.adapt import Teacher
from cats.finetuning.callbacks import HELDOUT, INDOMAIN, Bar, Grid
from cats.finetuning.checkpoints import last_checkpoint, reason, seal
from cats.finetuning.data import TrainingText, collate
from cats.finetuning.learned import Anneal, LearnedThresholds
from cats.finetuning.recipe import Recipe

_UNWRITTEN = ("file write failed", "unexpected pos", "PytorchStreamWriter")  # as torch.save says it
_SHIFT = "thresholds.safetensors"


class CatsTrainer(Trainer):
    """Trains an adapted model on `text`, measures `heldout` and `indomain` rows on the grid of the recipe.

    Every measurement is made at the target sparsity, with the thresholds that the run would end with.
    In `state.log_history`, for `prefix` "eval_heldout" and "eval_indomain": `<prefix>_nll`, nats a token;
    `<prefix>_rows` [N, 2], summed nats and targets of each row, and where there are answers whether its own
    is right [N, 3]; `<prefix>_realised` [L], the share zeroed; `<prefix>_accuracy` where there are answers;
    and "zero_shot" where that is set. Raises CatsError at a loss or gradient that is not finite, before it
    reaches the weights, and where a checkpoint cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        text: TrainingText,
        args: TrainingArguments,
        *,
        pad: int,
        teacher: Teacher | None = None,
        anneal: Anneal | None = None,
        learned: LearnedThresholds | None = None,
        minutes: float | None = None,
    ):
        self.recipe, self.text = recipe, text
        self.teacher, self.anneal, self.learned = teacher, anneal, learned
        self.zero_shot: Callable[[nn.Module], float] | None = None
        self.identity: dict = {}  # what its checkpoints are sealed with
        self.step_seconds: list[float] = []
        self.peak_bytes = 0  # of GPU memory in a training step
        self._finite, self._norm = True, 0.0
        compilation.allow(64)  # of layers, where accelerate compiles them: some for each method and recipe
        if args.n_gpu > 1:
            args._n_gpu = 1  # several GPUs are for `accelerate launch`, not for DataParallel
        super().__init__(
            model=model,
            args=args,
            train_dataset=text.train,
            eval_dataset={HELDOUT: text.heldout, INDOMAIN: text.indomain},
            data_collator=partial(collate, pad=pad),
            compute_metrics=self._metrics,
            callbacks=[Grid(self, minutes)],
        )
        for module in model.modules():
            if args.bf16 and isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False  # autocast does, behind the dropout and not before it
        self.remove_callback(PrinterCallback)  # both print every step's loss
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Bar)
        self._resume()

    def create_optimizer(self, model=None):
        """AdamW, with learned thresholds in a group of their own: another rate, and no decay."""
        if self.optimizer is None and self.learned is not None:
            shift = self.learned.shift
            shift.requires_grad_(False)
            optimizer = super().create_optimizer(model)
            shift.requires_grad_(True)
            optimizer.add_param_group(
                {"params": [shift], "lr": self.recipe.threshold_lr, "weight_decay": 0.0}
            )
            return optimizer
        return super().create_optimizer(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss on labels, or with a teacher (1 - w) of it and w of KL(teacher || student), in nats."""
        bare = {key: value for key, value in inputs.items() if key != "labels"}
        # a cache would be memory for nothing, and have each layer compiled anew where layers are
        inputs = {**inputs, "use_cache": False}
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weight = self.recipe.distil
        expected = self.teacher.logits(self.accelerator.unwrap_model(model), model, bare)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        targets = inputs["labels"][:, 1:] != -100
        count = targets.sum() if num_items_in_batch is None else num_items_in_batch
        divergence = (
            functional.kl_div(
                outputs.logits[:, :-1][targets].float().log_softmax(-1),
                expected[:, :-1][targets].float().log_softmax(-1),
                reduction="sum",
                log_target=True,
            )
            / count
        )
        if num_items_in_batch is not None:  # as the loss on labels: gradients are averaged over processes
            divergence = divergence * self.accelerator.num_processes
        loss = (1 - weight) * loss + weight * divergence
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Padding on the right is behind all that causal attention looks at. With a mask for it, cuDNN's
        # attention gives NaN gradients for some batches (torch 2.11, 16 rows of 64 tokens).
        unmasked = {key: value for key, value in inputs.items() if key != "attention_mask"}
        loss = super().training_step(model, unmasked, num_items_in_batch)
        self._finite = self._finite & torch.isfinite(loss)
        return loss

    def _clip_grad_norm(self, model):
        self._norm = super()._clip_grad_norm(model)
        return self._norm

    def check_finite(self) -> None:
        """Raise CatsError if a loss since the last step, or the gradient, is not finite."""
        for what, finite in (("loss", self._finite), ("gradient", math.isfinite(self._norm))):
            if not finite:
                raise _not_finite(what, self.state.global_step + 1)
        self._finite = True

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Trainer's evaluation of both sets of rows, at the thresholds that the run would end with."""
        if not isinstance(eval_dataset, str):
            self.settle()
            try:
                # for a few batches, layers that are observed would be compiled one by one
                with torch.compiler.set_stance("force_eager"):
                    metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
                    if self.zero_shot is not None:
                        self.state.log_history[-1]["zero_shot"] = self.zero_shot(
                            self.accelerator.unwrap_model(self.model)
                        )
                return metrics
            finally:
                self._resume()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        known = {"rows": self._rows[:, : 3 if self.text.answers else 2].tolist()}
        if self._rows.shape[1] > 4:
            known["realised"] = (self._rows[:, 4:].sum(0) / self._rows[:, 3].sum()).tolist()
        self.state.log_history[-1] |= {f"{metric_key_prefix}_{key}": value for key, value in known.items()}
        return metrics

    def settle(self) -> None:
        """Set the thresholds that the run would end with, and let the MLPs mask as they do at inference."""
        if self.anneal is not None:
            self.anneal.end()
        if self.learned is not None:
            self.learned.detach()
        autograd.detach(self.model)

    def _resume(self) -> None:
        if self.anneal is not None:
            self.anneal.at(self.state.global_step)
        if self.learned is None:
            autograd.attach(self.model)
        else:
            self.learned.attach()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(mean loss, rows, rows), rows [B, 4 + L]: summed nats, targets, whether the answer is right,
        tokens, and of each sparse layer the share zeroed, summed over tokens. Trainer gathers each row once.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"][:, 1:]
        mask = inputs["attention_mask"]
        unwrapped = self.accelerator.unwrap_model(self.model)
        sparse = sparse_mlps(unwrapped)
        meter = SparsityMeter(unwrapped, per_token=True) if sparse else None
        with torch.no_grad(), self.compute_loss_context_manager(), meter or nullcontext():
            bare = {key: value for key, value in inputs.items() if key != "labels"}
            logits = model(**bare, use_cache=False).logits[:, :-1]
        nats = torch.stack(  # row by row: logits of one row in fp32 are memory enough
            [
                functional.cross_entropy(row.float(), targets, reduction="sum")
                for row, targets in zip(logits, labels, strict=True)
            ]
        )
        counted = labels != -100
        right = torch.zeros_like(nats)
        if self.text.answers:
            first = counted.int().argmax(1)
            answers = torch.tensor(self.text.answers, device=labels.device)
            scores = logits[torch.arange(len(labels), device=labels.device), first][:, answers]
            right = (answers[scores.argmax(1)] == labels.gather(1, first[:, None])[:, 0]).float()
        rows = torch.stack([nats, counted.sum(1).float(), right, mask.sum(1).float()], 1)
        if meter is not None:
            overhead = torch.tensor([module.overhead for module in sparse])
            shares = (meter.per_token.T - overhead).to(rows.device)  # [N, L], a row a valid token
            zeroed = torch.zeros(len(rows), shares.shape[1], device=rows.device)
            rows = torch.cat([rows, zeroed.index_add_(0, mask.nonzero()[:, 0], shares)], 1)
        return nats.sum() / counted.sum(), rows, rows

    def _metrics(self, prediction) -> dict[str, float]:
        rows = prediction.predictions.astype(np.float64)
        self._rows = rows
        metrics = {"nll": float(rows[:, 0].sum() / rows[:, 1].sum())}
        if not math.isfinite(metrics["nll"]):
            raise _not_finite("held-out loss", self.state.global_step)
        return metrics | ({"accuracy": float(rows[:, 2].mean())} if self.text.answers else {})

    def _save_checkpoint(self, model, trial):
        """Trainer's checkpoint, sealed once every process has written its part; CatsError if it cannot be."""
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(checkpoint, self.identity)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _UNWRITTEN):
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            before = last_checkpoint(folder, self.args.world_size)
            raise CatsError(
                f"{checkpoint} cannot be written ({reason(error)}): make room, and the same command goes on "
                f"from {before.name if before else 'the beginning'}."
            ) from error

    def _save(self, output_dir=None, state_dict=None):
        """Adapters or weights as safetensors; Trainer would ask the hub, and pickle its arguments.

        Under FSDP every process is called, and only the first has the weights.
        """
        if not self.args.should_save:
            return
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
        elif hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(output_dir, state_dict=state_dict)
        else:
            super()._save(output_dir, state_dict)
        if self.learned is not None:
            save_file({"shift": self.learned.shift.detach().cpu()}, Path(output_dir) / _SHIFT)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_shift(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_shift(self.state.best_model_checkpoint)

    def _load_shift(self, checkpoint: str) -> None:
        if self.learned is not None:
            with torch.no_grad():
                self.learned.shift.copy_(load_file(Path(checkpoint) / _SHIFT)["shift"])


def _not_finite(what: str, step: int) -> CatsError:
    return CatsError(
        f"The {what} became NaN or infinite at step {step}: use a lower lr or float32; "
        "the last checkpoint is kept."
    )

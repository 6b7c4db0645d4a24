"""When a run measures, saves and stops."""

import sys
import time

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

HELDOUT, INDOMAIN = "heldout", "indomain"


class Bar(ProgressCallback):
    """The bar with the time left, and nothing else."""

    def on_log(self, args, state, control, logs=None, **_):
        pass


class Grid(TrainerCallback):
    """Measures and saves at the steps of the grid, saves in between, moves thresholds, keeps to the time."""

    def __init__(self, trainer, minutes: float | None):
        self.trainer = trainer
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.begun: tuple[float, int] = (0.0, 0)
        self.started = 0.0

    def on_train_begin(self, args, state, control, **_):
        self.begun = (time.monotonic(), state.global_step)

    def on_step_begin(self, args, state, control, **_):
        self.started = time.monotonic()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self.trainer.anneal is not None:
            self.trainer.anneal.at(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.trainer.check_finite()

    def on_step_end(self, args, state, control, **_):
        recipe = self.trainer.recipe
        self.trainer.step_seconds.append(time.monotonic() - self.started)
        if args.device.type == "cuda":
            self.trainer.peak_bytes = max(self.trainer.peak_bytes, torch.cuda.max_memory_allocated())
        on_grid = state.global_step in recipe.grid
        late = self.deadline is not None and self._agreed(time.monotonic() > self.deadline)
        control.should_evaluate = on_grid
        control.should_save = on_grid or late or state.global_step % recipe.save_every == 0
        control.should_training_stop |= late
        return control

    def on_log(self, args, state, control, logs=None, **_):
        key = f"eval_{HELDOUT}_nll"
        if key not in (logs or {}) or not state.is_world_process_zero:
            return
        seconds, done = time.monotonic() - self.begun[0], state.global_step - self.begun[1]
        left = f", {seconds / done * (state.max_steps - state.global_step):.0f} s left" if done else ""
        tqdm.write(
            f"{self.trainer.recipe.slug}: step {state.global_step} of {self.trainer.recipe.steps}, "
            f"held-out {logs[key]:.4f} nats{left}",
            file=sys.stderr,
        )

    def _agreed(self, late: bool) -> bool:
        """What the first process says: every one must stop at the same step."""
        flag = torch.tensor([float(late)], device=self.trainer.args.device)
        return bool(self.trainer.accelerator.gather(flag)[0] > 0)

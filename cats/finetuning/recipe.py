"""What one fine-tuning run is: the method, the reference code's hyperparameters, and how to recover."""

from dataclasses import asdict, dataclass

from transformers import SchedulerType

from cats import criteria
from cats.core.thresholds import sparsities
from cats.errors import CatsError

MOST = 1_000_000_000  # rows, steps or tokens of a run: its rows are in memory as a whole
_SEEDS = 2**32  # that NumPy takes
CHOICES = {
    "tuning": ("lora", "full"),
    "best": ("", "loss", "accuracy"),
    "dtype": ("float32", "bfloat16"),
    "schedule": tuple(kind.value for kind in SchedulerType),
}


@dataclass(frozen=True)
class Recipe:
    """The settings of a run; the defaults are the reference code's, at an equal batch for every method.

    `rule`: "dense" or one of `cats.criteria`; `sparsity`: gate sparsity in [0, 1), None for a rule without.
    Raises CatsError for values that cannot be. `steps`: optimizer steps; 0 trains nothing. `grid`:
    steps at which held-out loss is measured, zero and the last always among them. `batch`: rows of
    `sequence_length` tokens an optimizer step, over all processes; `rows_at_once` of them in one pass of one
    process, the rest by accumulation. `tuning`: "lora" or "full". `seed`: LoRA's weights, dropout and the
    order of rows.

    `unequal`: the reference code's setting, in which ReLUfication takes half the rows a step, and on
    instructions the dense model an eighth (its BoolQ script: 2 rows where CATS takes 16), at the same number
    of steps.
    `best`: "loss" or "accuracy" keeps the best checkpoint of the grid in place of the last;
    `reference_sign` compares accuracy as the reference code does, which keeps the worst.

    `distil`: weight in [0, 1] of KL(dense || sparse) on logits at temperature 1, against the loss on labels.
    `anneal`: share of the steps, in [0, 1], over which sparsity rises from zero to its target by Zhu and
    Gupta's cubic schedule. `learn_thresholds`: a straight-through estimator moves sparsity between layers at
    the same mean, at the rate `threshold_lr` (in units of sparsity a step). The dense model has no thresholds
    and trains without these two.
    `compile`: layers compiled by torch.compile, once for all of them, which takes about a minute and makes a
    GPU's steps faster.
    `recalibrate`: tokens of the calibration text on which thresholds are estimated once more at the end.
    """

    rule: str = criteria.DENSE
    sparsity: float | None = None
    seed: int = 0
    steps: int = 1350
    grid: tuple[int, ...] = (350, 600, 850, 1100, 1350)
    batch: int = 16
    rows_at_once: int = 1
    sequence_length: int = 1024
    tuning: str = "lora"
    lr: float = 1e-5
    schedule: str = "constant"
    weight_decay: float = 0.01
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    dtype: str = "bfloat16"
    checkpointing: bool = False
    compile: bool = False
    save_every: int = 50
    unequal: bool = False
    best: str = ""
    reference_sign: bool = False
    distil: float = 0.0
    anneal: float = 0.0
    learn_thresholds: bool = False
    threshold_lr: float = 1e-3
    recalibrate: int = 0

    def __post_init__(self):
        if self.sparse and criteria.rule(self.rule).adjustable:
            if self.sparsity is None:
                raise CatsError(f"{self.rule} needs a sparsity: {self.rule}:0.5, for example.")
            if isinstance(self.sparsity, (list, tuple)):
                raise CatsError(f"{self.rule} has a list in its list of sparsities: give numbers.")
            sparsities(self.sparsity, 1)
        elif self.sparsity is not None:
            raise CatsError(f"{self.rule} takes no sparsity: it has one of its own.")
        object.__setattr__(self, "grid", tuple(sorted({0, *self._whole(self.grid), self.steps})))
        self._check_counts()
        for name in ("distil", "anneal", "lora_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise CatsError(f"{name}={getattr(self, name)} is outside [0, 1].")
        if not 0 <= self.weight_decay < float("inf"):
            raise CatsError(f"weight_decay={self.weight_decay} is no number of at least 0.")
        for name in ("lr", "threshold_lr"):
            if not 0 < getattr(self, name) < 1:
                raise CatsError(f"{name}={getattr(self, name)} is outside (0, 1): 1e-5 is the paper's.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                shown = ", ".join(choice or "none" for choice in allowed)
                raise CatsError(f"Unknown {name} {getattr(self, name)!r}: use one of {shown}.")
        rule = criteria.rule(self.rule) if self.sparse else None
        if rule and not rule.trains:
            raise CatsError(
                f"{self.rule} cannot be fine-tuned here: use cats or another rule of thresholds, centred, "
                "relufication or dense."
            )
        if rule and not rule.thresholds and (self.anneal or self.learn_thresholds):
            raise CatsError(f"{self.rule} has no thresholds to anneal or learn: leave those options out.")
        if self.anneal and self.learn_thresholds:
            raise CatsError("anneal and learn_thresholds both set the thresholds: choose one.")

    def _check_counts(self) -> None:
        for name in ("batch", "rows_at_once", "save_every", "lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise CatsError(f"{name}={getattr(self, name)} is too small: use 1 or more.")
        if self.steps < 0 or self.recalibrate < 0 or self.seed < 0:
            raise CatsError("steps, recalibrate and seeds cannot be negative: use 0 or more.")
        if self.sequence_length < 2:
            raise CatsError(
                f"sequence_length={self.sequence_length} leaves nothing to predict: use 2 or more."
            )
        for name in ("rows_at_once", "save_every", "lora_r", "lora_alpha", "recalibrate"):
            if getattr(self, name) > MOST:
                raise CatsError(f"{name} is more than {MOST:,}: use less.")
        if self.seed >= _SEEDS:
            raise CatsError(f"A seed is less than {_SEEDS:,}: use a smaller one.")
        if max(1, self.steps) * self.batch * self.sequence_length > MOST:
            raise CatsError(
                f"steps x batch x sequence_length is more than {MOST:,} tokens, too many to have in memory: "
                "lower one of them."
            )

    def _whole(self, grid) -> list[int]:
        steps = [grid] if isinstance(grid, int) else list(grid)
        if any(not isinstance(step, int) or step < 0 for step in steps):
            raise CatsError(f"The grid {steps} must hold numbers of steps.")
        return [step for step in steps if step <= self.steps]

    @property
    def sparse(self) -> bool:
        return self.rule != criteria.DENSE

    @property
    def method(self) -> str:
        """As tables name it: "dense", "cats 0.5", "relufication"."""
        return self.rule if self.sparsity is None else f"{self.rule} {self.sparsity:g}"

    @property
    def slug(self) -> str:
        return f"{self.method.replace(' ', '-')}-seed{self.seed}"

    def rows_a_step(self, *, instructions: bool = False) -> int:
        """Rows an optimizer step, which only `unequal` makes differ between methods."""
        if not self.unequal:
            return self.batch
        if instructions:
            return self.batch if self.sparse else max(1, self.batch // 8)
        return max(1, self.batch // 2) if self.rule == "relufication" else self.batch

    def accumulation(self, processes: int, *, instructions: bool = False) -> int:
        """Passes an optimizer step; raises CatsError where the batch is no multiple of what runs at once."""
        rows, at_once = self.rows_a_step(instructions=instructions), self.rows_at_once * processes
        if rows % at_once:
            raise CatsError(
                f"A step of {rows} rows is no multiple of {at_once}, {self.rows_at_once} on each of "
                f"{processes} processes: change batch or rows_at_once."
            )
        return rows // at_once

    def describe(self) -> dict:
        """What a record keeps: everything but what its rows say."""
        return {key: value for key, value in asdict(self).items() if key not in ("rule", "sparsity", "seed")}

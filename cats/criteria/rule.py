"""What every rule offers: calibrate once on a model, apply at any sparsity, and say what that saves."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from cats.calibration.calibrate import calibrate
from cats.core.accounting import Accounting
from cats.core.activation import CatsMLP
from cats.core.sparsify import restore, sparsify
from cats.core.structure import find_gated_mlps
from cats.core.thresholds import Thresholds
from cats.criteria.generate import continue_prompts
from cats.errors import CatsError


def uniform(sparsity: float) -> float:
    """The paper's allocation: one gate sparsity for every layer."""
    return sparsity


@dataclass
class Fit:
    """A rule calibrated on one model: thresholds, which apply at any gate sparsity.

    `allocation`: from a gate sparsity in [0, 1) to one number, or to one per layer of which that is the
    mean over all gate activations.
    """

    rule: str
    thresholds: Thresholds
    allocation: Callable[[float], float | list[float]] = field(default=uniform)
    runs_model: ClassVar[bool] = False  # `apply` does, on text: on a GPU in a fraction of the time

    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        """Make `model` sparse in place; raises CatsError where it is not the calibrated one."""
        return sparsify(model, self.thresholds, self.allocation(sparsity))

    def to_train(self, model: nn.Module, sparsity: float) -> nn.Module:
        """`apply` for fine-tuning, of a rule that `trains`."""
        return self.apply(model, sparsity)

    def undo(self, model: nn.Module) -> nn.Module:
        """Put everything back as it was."""
        if any(isinstance(module, CatsMLP) for module in model.modules()):
            restore(model)
        return model

    def continuing(self, sparsity: float | None) -> Callable:
        """How text is generated: greedy search, of the interface of `cats.continuation.continue_prompts`."""
        return continue_prompts

    def counted(self) -> dict[str, int]:
        """Counts of the text generated since the last call, which results keep; none for most rules."""
        return {}

    def steer(self, sparsity: float) -> Callable | None:
        """What `cats.masking.Masking` moves thresholds with while the model runs; None leaves them."""
        return None

    def gate_sparsity(self, sparsity: float) -> float | None:
        """Target share of gate activations zeroed; None for a rule without such a target."""
        return sparsity

    def model_sparsity(self, shape: Accounting, sparsity: float) -> float | None:
        """Target share of the blocks' linear weights that a decoded token does without; None as above."""
        return shape.model_sparsity(sparsity)

    def bytes_per_token(
        self, shape: Accounting, sparsity: float, bytes_per_weight: float = 2
    ) -> float | None:
        """Weight bytes read for one decoded token at batch 1 and the target sparsity; None as above."""
        return shape.bytes_per_token(sparsity, bytes_per_weight)

    def describe(self) -> dict:
        """What a result says about the calibration."""
        thresholds = self.thresholds
        return {
            "criterion": thresholds.criterion,
            "corpus": thresholds.corpus,
            "tokens": thresholds.tokens,
            "policy": thresholds.policy,
        }


class Rule(ABC):
    """A criterion by name, with its title in tables and, in one sentence, what it does and whose it is.

    `adjustable` False: the rule has one sparsity of its own and takes none. `thresholds` False: its fits have
    no thresholds, which fine-tuning could anneal or learn. `trains` False: its masks would not stay what they
    are while weights change.
    """

    name: str
    title: str
    what: str
    adjustable: bool = True
    thresholds: bool = True
    trains: bool = True

    def check(self, model: nn.Module) -> None:
        """Raise CatsError where the rule does not apply to the model; no text is read."""
        find_gated_mlps(model)

    def reach(self, shape: Accounting) -> float:
        """Model-level sparsity of this rule for each unit of its own sparsity."""
        return shape.max_model_sparsity

    def own_sparsity(self, shape: Accounting, model_sparsity: float) -> float:
        """The rule's own sparsity for a target of model-level sparsity, the share of the blocks' linear
        weights that a decoded token does without; CatsError where the rule cannot reach it.
        """
        reach = self.reach(shape)
        if not self.adjustable or not 0 <= model_sparsity < reach:
            what = f"at most {reach:.1%} of this model" if self.adjustable else "no sparsity of choice"
            raise CatsError(
                f"{self.name} cannot reach a model-level sparsity of {model_sparsity:.1%}: it has {what}."
            )
        return model_sparsity / reach

    @abstractmethod
    def calibrate(
        self, model: nn.Module, batches, *, source: dict | None = None, progress: bool = True
    ) -> Fit:
        """Measure what the rule needs on `batches`, as of `cats.corpora.batches`, which it may read more
        than once.

        `source` as in `cats.calibration.calibrate`. Leaves the model as it was. Raises CatsError where the
        rule does not apply to the model.
        """


class WeightedRule(Rule):
    """A rule of the scores |z_j| w_j with one weight per neuron: the paper's quantile over a layer's scores.

    Neuron j keeps z where |z| >= t / w_j: the kernel and the bytes are those of CATS.
    """

    def check(self, model: nn.Module) -> None:
        sizes = {mlp.intermediate_size for mlp in find_gated_mlps(model)}
        if len(sizes) > 1:
            raise CatsError(
                f"{self.name} does not apply to {type(model).__name__}, whose layers differ in "
                "intermediate size: use cats."
            )

    @abstractmethod
    def weights(self, model: nn.Module, batches, progress: bool) -> Tensor:
        """[L, m], not negative; only their ratios within a layer matter."""

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        self.check(model)
        weights = self.weights(model, batches, progress)
        return Fit(self.name, calibrate(model, batches, source=source, weights=weights, progress=progress))

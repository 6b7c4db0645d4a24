"""What every rule offers: calibrate once on a model, apply at any sparsity, and say what that saves."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cats.calibration.calibrate import calibrate
from cats.core.accounting import Accounting
from cats.core.activation import CatsMLP
from cats.core.sparsify import restore, sparsify
from cats.core.structure import find_gated_mlps
from cats.core.thresholds import Thresholds
from cats.criteria.generate import continue_prompts
from cats.criteria.masking import Masking, Policy
from cats.errors import CatsError

RULES: dict[str, "Rule"] = {}


class Fit(ABC):
    """A rule calibrated on one model: it makes that model sparse at any sparsity, and dense again."""

    rule: str
    runs_model: ClassVar[bool] = False  # `apply` does, on text: on a GPU in a fraction of the time

    @abstractmethod
    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        """Make `model` sparse in place; raises CatsError where it is not the calibrated one."""

    def to_train(self, model: nn.Module, sparsity: float) -> nn.Module:
        """`apply` for fine-tuning, of a rule that `trains`: nothing is kept that `undo` would need."""
        return self.apply(model, sparsity)

    def undo(self, model: nn.Module) -> nn.Module:
        """Put everything back as it was."""
        if any(isinstance(module, CatsMLP) for module in model.modules()):
            restore(model)
        return model

    def continuing(self, sparsity: float | None) -> Callable:
        """How text is generated: greedy search, called as `cats.criteria.generate.continue_prompts` is."""
        return continue_prompts

    def counted(self) -> dict[str, int]:
        """Counts of the text generated since the last call, which results keep; none for most rules."""
        return {}

    def steer(self, sparsity: float) -> Callable | None:
        """What `cats.criteria.masking.Masking` moves thresholds with while the model runs, if anything."""
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

    @abstractmethod
    def describe(self) -> dict:
        """What a result says about the calibration: its criterion at least."""


def uniform(sparsity: float) -> float:
    """The paper's allocation: one gate sparsity for every layer."""
    return sparsity


@dataclass
class ThresholdFit(Fit):
    """Thresholds, which apply at any gate sparsity.

    `allocation`: from a gate sparsity in [0, 1) to one number, or to one per layer of which that is the
    mean over all gate activations.
    """

    rule: str
    thresholds: Thresholds
    allocation: Callable[[float], float | list[float]] = uniform

    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        return sparsify(model, self.thresholds, self.allocation(sparsity))

    def describe(self) -> dict:
        thresholds = self.thresholds
        return {
            "criterion": thresholds.criterion,
            "corpus": thresholds.corpus,
            "tokens": thresholds.tokens,
            "policy": thresholds.policy,
        }


@contextmanager
def applied(
    model: nn.Module, fit: Fit | None, sparsity: float | None, policy: Policy | None = None
) -> Iterator[Masking]:
    """`model` under a fit inside a Masking, thresholds steered where the fit does so; dense afterwards.

    Without a fit the model is dense, nothing is masked and no sparsity is realised. Errors as `Fit.apply`.
    """
    if fit is not None:
        fit.apply(model, sparsity)
    try:
        with Masking(model, policy, steer=None if fit is None else fit.steer(sparsity)) as masking:
            yield masking
    finally:
        if fit is not None:
            fit.undo(model)


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

    def max_model_sparsity(self, shape: Accounting) -> float:
        """Model-level sparsity at sparsity 1 of this rule, which it cannot exceed."""
        return shape.max_model_sparsity

    def sparsity_for(self, shape: Accounting, model_sparsity: float) -> float:
        """The rule's sparsity that leaves out the share `model_sparsity` of the blocks' linear weights.

        Raises CatsError where the rule cannot reach it.
        """
        most = self.max_model_sparsity(shape)
        if not self.adjustable or not 0 <= model_sparsity < most:
            what = f"at most {most:.1%} of this model" if self.adjustable else "no sparsity of choice"
            raise CatsError(
                f"{self.name} cannot reach a model-level sparsity of {model_sparsity:.1%}: it has {what}."
            )
        return model_sparsity / most

    @abstractmethod
    def calibrate(
        self, model: nn.Module, batches, *, source: dict | None = None, progress: bool = True
    ) -> Fit:
        """Measure what the rule needs on `batches`, as of `cats.corpora.batches`, which may be read twice.

        `source` as in `cats.calibration.calibrate`. Leaves the model as it was. Raises CatsError where the
        rule does not apply to the model.
        """


def register(kind: type[Rule]) -> type[Rule]:
    """Class decorator: the rule is in RULES, under the name by which users ask for it."""
    RULES[kind.name] = kind()
    return kind


def corpus_of(source: dict | None) -> dict:
    """What `source` says about the text, which is all but the model."""
    return {key: value for key, value in (source or {}).items() if key != "model"}


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

    def calibrate(self, model, batches, *, source=None, progress=True) -> ThresholdFit:
        self.check(model)
        weights = self.weights(model, batches, progress)
        thresholds = calibrate(model, batches, source=source, weights=weights, progress=progress)
        return ThresholdFit(self.name, thresholds)

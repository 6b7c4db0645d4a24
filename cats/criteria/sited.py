"""Rules that drop inputs or outputs of Linears by hooks: what they share."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cats.calibration.blocks import blocks
from cats.core.accounting import Accounting
from cats.core.structure import GatedMLP, find_gated_mlps
from cats.criteria.rule import Fit, Rule, corpus_of
from cats.criteria.sites import Site, attach, detach, is_sparse
from cats.errors import CatsError


class BlockLinear(NamedTuple):
    """One Linear of the decoder's blocks: number of its block, and its name in there."""

    layer: int
    name: str
    module: nn.Linear

    @property
    def key(self) -> tuple[int, str]:
        return self.layer, self.name


@dataclass
class SitedFit(Fit):
    """A rule of sites calibrated on one model: `state` is what `definition` measured on the text `corpus`."""

    definition: "SitedRule"
    state: Any
    corpus: dict

    @property
    def rule(self) -> str:
        return self.definition.name

    def apply(self, model: nn.Module, sparsity: float) -> nn.Module:
        self.check(model, sparsity)
        return attach(model, self.sites(model, sparsity))

    def check(self, model: nn.Module, sparsity: float) -> None:
        """Raise CatsError for a sparsity outside [0, 1) and a model that is sparse already."""
        if not 0 <= sparsity < 1:
            raise CatsError(f"Sparsity {sparsity!r} is outside [0, 1): it is a share to drop.")
        if is_sparse(model):
            raise CatsError(f"{self.rule} is applied to a model that is sparse already: undo that first.")

    def sites(self, model: nn.Module, sparsity: float) -> list[Site]:
        """What drops the share `sparsity` of a dense model."""
        return self.definition.sites(model, self.state, sparsity)

    def undo(self, model: nn.Module) -> nn.Module:
        return detach(model)

    def gate_sparsity(self, sparsity: float) -> float | None:
        return sparsity if self.definition.neurons else None

    def model_sparsity(self, shape: Accounting, sparsity: float) -> float:
        return sparsity * self.definition.max_model_sparsity(shape)

    def bytes_per_token(self, shape: Accounting, sparsity: float, bytes_per_weight: float = 2) -> float:
        read = shape.block_weights * (1 - self.model_sparsity(shape, sparsity)) + shape.head_weights
        return read * bytes_per_weight

    def describe(self) -> dict:
        return {"criterion": self.definition.what, "corpus": self.corpus}


class SitedRule(Rule):
    """A rule of sites. `neurons`: its own sparsity is the share of the MLPs' neurons that a token drops."""

    neurons = False
    thresholds = trains = False

    def check(self, model: nn.Module) -> None:
        find_gated_mlps(model)
        blocks(model)
        if any(hasattr(module, "base_layer") for module in model.modules()):
            raise CatsError(f"{self.name} does not apply to a model with adapters: merge them first.")

    def calibrate(self, model, batches, *, source=None, progress=True) -> SitedFit:
        self.check(model)
        return SitedFit(self, self.measure(model, batches, progress), corpus_of(source))

    @abstractmethod
    def measure(self, model: nn.Module, batches, progress: bool) -> Any:
        """What the rule needs, from the dense model on `batches`."""

    @abstractmethod
    def sites(self, model: nn.Module, state: Any, sparsity: float) -> list[Site]:
        """What drops the share `sparsity`, by the measure of the rule."""


class InputRule(SitedRule):
    """A rule that drops inputs of every Linear of the blocks; its own sparsity is the model-level one.

    One activation of an input saves the Linear a column of weights: `out_features` of them.
    """

    def max_model_sparsity(self, shape: Accounting) -> float:
        return 1.0

    def shares(self, model: nn.Module, state: Any, sparsity: float) -> dict[tuple[int, str], float]:
        """The share of inputs to drop of each Linear; their mean over weights is `sparsity`."""
        return {linear.key: sparsity for linear in block_linears(model)}

    @abstractmethod
    def keep(self, linear: BlockLinear, state: Any, share: float) -> Callable:
        """The `keep` of a `cats.criteria.sites.Site` that drops `share` of the inputs of one Linear."""

    def site(self, linear: BlockLinear, state: Any, share: float) -> Site:
        """What drops `share` of the inputs of one Linear."""
        keep = self.keep(linear, state, share)
        return Site(linear.layer, linear.name, linear.module, keep, linear.module.out_features)

    def sites(self, model, state, sparsity):
        shares = self.shares(model, state, sparsity)
        return [self.site(linear, state, shares[linear.key]) for linear in block_linears(model)]


def block_linears(model: nn.Module) -> list[BlockLinear]:
    """Every Linear of the decoder's blocks, in order and with the size that it has in this model."""
    return [
        BlockLinear(layer, name, module)
        for layer, block in enumerate(blocks(model))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def neuron_site(mlp: GatedMLP, part: str, keep: Callable, **options) -> Site:
    """A site on the output of the gate (`part` "gate") or up projection of one MLP.

    act(0) = 0 for every activation here: a zero output is a neuron dropped, and two products of `hidden_size`
    weights go with it.
    """
    return Site(
        mlp.layer,
        part,
        mlp.projection(part),
        keep,
        2 * mlp.hidden_size,
        at="output",
        start=mlp.first_output(part),
        width=mlp.intermediate_size,
        neurons=True,
        **options,
    )


def at_least(threshold: float, centre: float = 0.0) -> Callable:
    """Keep x where |x - centre| >= threshold, or NaN; compared in fp32, to which the threshold is exact."""

    def keep(x: Tensor, call=None) -> Tensor:
        distance = (x.float() - centre).abs() if centre else x.abs().float()
        return ~(distance < threshold)

    return keep


def drop_lowest(score: Tensor, share: float) -> Tensor:
    """Keep all but the round(share n) lowest scores of each row [..., n], fp32 or fp64: exactly so many.

    Of equal scores the first are dropped.
    """
    drop = round(share * score.shape[-1])
    if drop == 0:
        return torch.ones_like(score, dtype=torch.bool)
    limit = score.kthvalue(drop, dim=-1, keepdim=True).values
    below, equal = score < limit, score == limit
    left = drop - below.sum(-1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left)))

"""CATS around a centre: a gate activation that is dropped becomes its neuron's median c_j instead of zero.

What dropped neurons then add, c_j (x W_up)_j times their row of W_down, is linear in x. Summed over all
neurons it is x A with one matrix A = sum_j c_j W_up,j W_down,j^T [d, d], which every token reads, and a
neuron that is kept adds (z_j - c_j) (x W_up)_j: the rows read are those of CATS. A is paid for by more
neurons dropped, d / 2m of them, so that the bytes are those of CATS at the same sparsity. A layer whose
output on a sample is nearer to the dense one without centres has none.

After the modes of SCAP (arXiv 2412.07174), whose inputs are centred on one number a layer, at no weights
read; here each neuron has its own, which multiplies another projection and therefore needs A.
"""

from typing import ClassVar

from torch import Tensor, nn

from cats.calibration.centred import calibrate_centred
from cats.core.activation import ACTIVATIONS
from cats.core.centred import CentredMLP
from cats.core.sparsify import sparsify
from cats.core.structure import GatedMLP, cats_mlps, find_gated_mlps
from cats.core.thresholds import Thresholds
from cats.criteria.rule import corpus_of, register
from cats.criteria.sited import SitedFit, SitedRule, neuron_site
from cats.criteria.sites import Site
from cats.errors import CatsError


@register
class Centred(SitedRule):
    """The rule `centred`: its sparsity is the share of W_up and W_down that a token does without, less A."""

    name = "centred"
    title = "CATS centred"
    what = (
        "gate activations near their neuron's median are set to it, by one threshold a layer on the distance "
        "times the neuron's rms x W_up; what they add is one d x d product, paid for in neurons"
    )
    neurons = True
    trains = True

    def measure(self, model, batches, progress=True) -> Thresholds:
        return calibrate_centred(model, batches, progress=progress)

    def calibrate(self, model, batches, *, source=None, progress=True) -> "CentredFit":
        self.check(model)
        thresholds = calibrate_centred(model, batches, source=source, progress=progress)
        return CentredFit(self, thresholds, corpus_of(source))

    def from_thresholds(self, thresholds: Thresholds) -> "CentredFit":
        return CentredFit(self, thresholds, thresholds.corpus)

    def sites(self, model, state, sparsity):
        if not sparsity:
            return []
        return [
            self.site(mlp, state, sparsity, centred=state.centres.centred(mlp.layer, sparsity))
            for mlp in find_gated_mlps(model)
        ]

    def site(self, mlp: GatedMLP, state: Thresholds, sparsity: float, *, centred: bool) -> Site:
        """What drops one layer's neurons, with centres or without."""
        device = mlp.gate.weight.device
        threshold, centre = state.setting(mlp.layer, sparsity, centred)
        threshold, centre = threshold.to(device), 0.0 if centre is None else centre.to(device)
        act = ACTIVATIONS[mlp.activation]

        def keep(x: Tensor, call=None) -> Tensor:
            return ~((act(x.float()) - centre).abs() < threshold)

        fill = state.centres.gates[mlp.layer].to(mlp.gate.weight) if centred else 0.0
        return neuron_site(mlp, "gate", keep, fill=fill, weights_added=mlp.hidden_size**2 if centred else 0)


class CentredFit(SitedFit):
    """The rule `centred`, calibrated on one model."""

    runs_model: ClassVar[bool] = True

    def install(self, model: nn.Module, sparsity: float) -> nn.Module:
        """Build the rule into `model`, as `cats.sparsify` does; `cats.restore` takes it out.

        `apply` evaluates, this runs: the same masks, in modules of `cats.core.centred`. Raises CatsError for
        a sparsity outside (0, 1) and as `apply`.
        """
        if not 0 < sparsity < 1:
            raise CatsError(f"Sparsity {sparsity!r} is outside (0, 1): it is the share to drop.")
        self.check(model, sparsity)
        return self.build(model, sparsity)

    def build(self, model: nn.Module, sparsity: float) -> nn.Module:
        """`install` on what is checked."""
        return sparsify(model, self.state, sparsity)

    def to_train(self, model: nn.Module, sparsity: float) -> nn.Module:
        for module in cats_mlps(self.install(model, sparsity)):
            if isinstance(module, CentredMLP):
                module.unfold()
        return model

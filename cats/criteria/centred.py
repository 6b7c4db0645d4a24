"""CATS around a centre: a gate activation that is dropped becomes its neuron's median c_j instead of zero.

What dropped neurons then add, c_j (x W_up)_j times their row of W_down, is linear in x. Summed over all
neurons it is x A with one matrix A = sum_j c_j W_up,j W_down,j^T [d, d], which every token reads, and a
neuron that is kept adds (z_j - c_j) (x W_up)_j: the rows read are those of CATS. A is paid for by more
neurons dropped, d / 2m of them, so that the bytes are those of CATS at the same sparsity. A layer whose
output on a sample is nearer to the dense one without centres has none.

After the modes of SCAP (arXiv 2412.07174), whose inputs are centred on one number a layer, at no weights
read; here each neuron has its own, which multiplies another projection and therefore needs A.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from cats.calibration.histogram import Quantiles
from cats.calibration.stream import watch, watch_neurons
from cats.core.activation import ACTIVATIONS
from cats.core.centred import CentredMLP
from cats.core.sparsify import centre
from cats.core.structure import GatedMLP, cats_mlps, find_gated_mlps
from cats.criteria.refit import root_size
from cats.criteria.rule import corpus_of, register
from cats.criteria.sited import SitedFit, SitedRule, at_least, neuron_site
from cats.criteria.sites import Site
from cats.errors import CatsError

_MEDIANS, _ERRORS = 512, 128  # tokens in the samples, at least, where the text has so many


@dataclass
class CentredState:
    """What the rule knows of each layer.

    `gates` [m]: medians of x W_gate; `weights` [m]: rms of x W_up, a neuron's weight; `inputs` [N, d]:
    samples of x; `scores`: quantiles of |z - c| times the weight, by (layer, with a centre).
    """

    gates: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    scores: Quantiles = field(default_factory=Quantiles)


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

    def measure(self, model, batches, progress=True) -> CentredState:
        gates: dict[int, _Sample] = {}
        inputs: dict[int, _Sample] = {}
        squares: dict[int, Tensor] = {}
        state = CentredState()

        def see(mlp: GatedMLP, part: str, x: Tensor) -> None:
            if part == "gate":
                gates.setdefault(mlp.layer, _Sample(_MEDIANS)).see(x)
            else:
                squares[mlp.layer] = squares.get(mlp.layer, 0) + x.float().pow(2).sum(0).double()

        def score(mlp: GatedMLP, _, gate: Tensor) -> None:
            for centred in (False, True):
                state.scores.see((mlp.layer, centred), self._score(mlp, state, gate, centred))

        tokens = watch_neurons(model, ("gate", "up"), batches, see, progress=progress)
        for layer, sample in gates.items():
            state.gates[layer] = sample.rows.median(0).values
            state.weights[layer] = (squares[layer] / tokens).sqrt().float()
        modules = [
            (inputs.setdefault(mlp.layer, _Sample(_ERRORS)), mlp.gate) for mlp in find_gated_mlps(model)
        ]
        watch(model, modules, batches, lambda sample, x: sample.see(x), progress=progress)
        state.inputs = {layer: sample.rows for layer, sample in inputs.items()}
        watch_neurons(model, ("gate",), batches, score, progress=progress)
        return state

    def calibrate(self, model, batches, *, source=None, progress=True) -> "CentredFit":
        self.check(model)
        return CentredFit(self, self.measure(model, batches, progress), corpus_of(source))

    @torch.no_grad()
    def sites(self, model, state, sparsity):
        if not sparsity:
            return []
        return [
            self.site(mlp, state, sparsity, centred=self.gains(mlp, state, sparsity))
            for mlp in find_gated_mlps(model)
        ]

    def gains(self, mlp: GatedMLP, state: CentredState, sparsity: float) -> bool:
        """Whether one layer's output on the sample is nearer to the dense one with centres than without.

        By the error of each token relative to its size.
        """
        x = state.inputs[mlp.layer].to(mlp.gate.weight)
        dense = mlp.module(x).float()
        root = root_size(dense)
        errors = []
        for centred in (False, True):
            if self.threshold(mlp, state, sparsity, centred) is None:
                return False
            output = output_with(self.site(mlp, state, sparsity, centred=centred), mlp, x).float()
            errors.append(float(((output - dense) * root).pow(2).sum(-1).mean()))
        return errors[1] < errors[0]

    def threshold(self, mlp: GatedMLP, state: CentredState, sparsity: float, centred: bool) -> float | None:
        """The score below which neurons are dropped; None where A takes as much as all that are left."""
        dropped = sparsity + centred * mlp.hidden_size / (2 * mlp.intermediate_size)
        return None if dropped >= 1 else state.scores.at((mlp.layer, centred), dropped)

    def site(self, mlp: GatedMLP, state: CentredState, sparsity: float, *, centred: bool) -> Site:
        """What drops one layer's neurons, with centres or without."""
        enough = at_least(self.threshold(mlp, state, sparsity, centred))

        def keep(x: Tensor, call=None) -> Tensor:
            return enough(self._score(mlp, state, x, centred))

        fill = state.gates[mlp.layer].to(mlp.gate.weight) if centred else 0.0
        return neuron_site(mlp, "gate", keep, fill=fill, weights_added=mlp.hidden_size**2 if centred else 0)

    @staticmethod
    def _score(mlp: GatedMLP, state: CentredState, gate: Tensor, centred: bool) -> Tensor:
        """|act(gate) - c| times the neuron's weight, fp32 [..., m]; c = 0 without a centre."""
        act = ACTIVATIONS[mlp.activation]
        z = act(gate.float())
        if centred:
            z = z - act(state.gates[mlp.layer].to(gate.device))
        return z.abs() * state.weights[mlp.layer].to(gate.device)


def output_with(site: Site, mlp: GatedMLP, x: Tensor) -> Tensor:
    """What the MLP makes of x [N, d] with the site attached."""
    site.attach()
    try:
        return mlp.module(x)
    finally:
        site.detach()


class CentredFit(SitedFit):
    """The rule `centred`, calibrated on one model."""

    runs_model: ClassVar[bool] = True

    @torch.no_grad()
    def install(self, model: nn.Module, sparsity: float) -> nn.Module:
        """Build the rule into `model`; `cats.restore` takes it out.

        The model then decodes with the rule's kernel on a GPU and saves by `save_pretrained`. `apply`
        evaluates, this runs: the same masks, in modules of `cats.core.centred`. Costs a matrix A in memory
        for each layer with centres. Raises CatsError for a sparsity outside (0, 1) and as `apply`.
        """
        if not 0 < sparsity < 1:
            raise CatsError(f"Sparsity {sparsity!r} is outside (0, 1): it is the share to drop.")
        self.check(model, sparsity)
        thresholds, centres, added = [], [], []
        for mlp, site in zip(find_gated_mlps(model), self.sites(model, sparsity), strict=True):
            centred = site.weights_added > 0
            threshold = self.definition.threshold(mlp, self.state, sparsity, centred)
            thresholds.append(threshold / self.state.weights[mlp.layer])
            act = ACTIVATIONS[mlp.activation]
            centres.append(act(self.state.gates[mlp.layer]) if centred else None)
            added.append(None if site.bypass is None else site.bypass.matrix.float())
        return centre(model, thresholds, centres, sparsity, added=added, calibrated=self.describe())

    def to_train(self, model: nn.Module, sparsity: float) -> nn.Module:
        for module in cats_mlps(self.install(model, sparsity)):
            if isinstance(module, CentredMLP):
                module.unfold()
        return model


class _Sample:
    """Rows [least … 2 least, n] of a stream, evenly spaced, fewer where it is shorter."""

    def __init__(self, least: int):
        self.least, self.rows = least, None
        self._seen, self._stride = 0, 1

    def see(self, x: Tensor) -> None:
        taken = x[-self._seen % self._stride :: self._stride].float().cpu()
        self._seen += len(x)
        self.rows = taken if self.rows is None else torch.cat([self.rows, taken])
        while len(self.rows) >= 2 * self.least:
            self.rows = self.rows[::2]
            self._stride *= 2

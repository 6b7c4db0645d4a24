"""CATS around a centre: a gate activation that is dropped becomes its neuron's median c_j instead of zero.

What dropped neurons then add, c_j (x W_up)_j times their row of W_down, is linear in x. Summed over all
neurons it is x A with one matrix A = sum_j c_j W_up,j W_down,j^T [d, d], which every token reads, and a
neuron that is kept adds (z_j - c_j) (x W_up)_j: the rows read are those of CATS. A is paid for by more
neurons dropped, d / 2m of them, so that the bytes are those of CATS at the same sparsity.

After the modes of SCAP (arXiv 2412.07174), whose inputs are centred on one number a layer, at no weights
read; here each neuron has its own, which multiplies another projection and therefore needs A.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cats.activation import ACTIVATIONS
from cats.criteria.sited import Quantiles, SitedRule, neuron_site, watch_neurons
from cats.errors import CatsError
from cats.structure import GatedMLP, find_gated_mlps

_SAMPLE = 512  # tokens for the medians, at least, where the text has so many


@dataclass
class CentredState:
    """By layer: medians of x W_gate [m], rms of x W_up [m] as weights of a neuron, and quantiles of the
    scores |z - c| times these.
    """

    gates: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    scores: Quantiles = field(default_factory=Quantiles)


class Centred(SitedRule):
    """The rule `centred`: its sparsity is the share of W_up and W_down that a token does without, less A."""

    name = "centred"
    title = "CATS centred"
    what = (
        "gate activations near their neuron's median are set to it, by one threshold a layer on the distance "
        "times the neuron's rms x W_up; their part of the output is one d x d product, paid for in neurons"
    )
    neurons = True

    def measure(self, model, batches, progress=True) -> CentredState:
        samples: dict[int, _Sample] = {}
        squares: dict[int, Tensor] = {}
        state = CentredState()

        def see(mlp: GatedMLP, part: str, x: Tensor) -> None:
            if part == "gate":
                samples.setdefault(mlp.layer, _Sample()).see(x)
            else:
                squares[mlp.layer] = squares.get(mlp.layer, 0) + x.float().pow(2).sum(0).double()

        def score(mlp: GatedMLP, _, gate: Tensor) -> None:
            state.scores.see(mlp.layer, _distance(mlp, gate, *self._of(state, mlp.layer)))

        tokens = watch_neurons(model, ("gate", "up"), batches, see, progress=progress)
        for layer, sample in samples.items():
            state.gates[layer] = sample.rows.median(0).values
            state.weights[layer] = (squares[layer] / tokens).sqrt().float()
        watch_neurons(model, ("gate",), batches, score, progress=progress)
        return state

    def sites(self, model, state, sparsity):
        return [self._site(mlp, state, sparsity) for mlp in find_gated_mlps(model)] if sparsity else []

    def _site(self, mlp: GatedMLP, state: CentredState, sparsity: float):
        price = mlp.hidden_size / (2 * mlp.intermediate_size)
        if sparsity + price >= 1:
            raise CatsError(
                f"{self.name} cannot reach {sparsity:.1%} on this model: its matrix of {mlp.hidden_size} x "
                f"{mlp.hidden_size} takes as much as {price:.1%} of the neurons, so ask for less than "
                f"{1 - price:.1%}."
            )
        gate, weight = self._of(state, mlp.layer)
        threshold = state.scores.at(mlp.layer, sparsity + price)

        def keep(x: Tensor, call=None) -> Tensor:
            return ~(_distance(mlp, x, gate, weight) < threshold)

        site = neuron_site(mlp, "gate", keep)
        site.fill = gate.to(site.linear.weight.device, site.linear.weight.dtype)
        site.extra = mlp.hidden_size**2
        return site

    @staticmethod
    def _of(state: CentredState, layer: int) -> tuple[Tensor, Tensor]:
        return state.gates[layer], state.weights[layer]


class _Sample:
    """Rows [_SAMPLE … 2 _SAMPLE, m] of a stream, evenly spaced, fewer where it is shorter."""

    def __init__(self):
        self.rows: Tensor | None = None
        self._seen, self._stride = 0, 1

    def see(self, x: Tensor) -> None:
        taken = x[-self._seen % self._stride :: self._stride].float().cpu()
        self._seen += len(x)
        self.rows = taken if self.rows is None else torch.cat([self.rows, taken])
        while len(self.rows) >= 2 * _SAMPLE:
            self.rows = self.rows[::2]
            self._stride *= 2


def _distance(mlp: GatedMLP, gate: Tensor, centre: Tensor, weight: Tensor) -> Tensor:
    """|act(gate) - act(centre)| times the neuron's weight, fp32: gate [..., m], centre and weight [m]."""
    act = ACTIVATIONS[mlp.activation]
    return (act(gate.float()) - act(centre.to(gate.device))).abs() * weight.to(gate.device)


RULE = Centred()

"""CATS around a centre: a gate activation that is dropped becomes its neuron's median c_j instead of zero.

What dropped neurons then add, c_j (x W_up)_j times their row of W_down, is linear in x. Summed over all
neurons it is x A with one matrix A = sum_j c_j W_up,j W_down,j^T [d, d], and a neuron that is kept adds
(z_j - c_j) (x W_up)_j: the rows read are those of CATS. Every token reads A, or two factors of it of rank r,
which is paid for by more neurons dropped, so that the bytes are those of CATS at the same sparsity. Of a few
ranks, and of no centre at all, each layer takes what has the least error of its output on a sample.

After the modes of SCAP (arXiv 2412.07174), whose inputs are centred on one number a layer, at no weights
read; here each neuron has its own, which multiplies another projection and therefore needs A.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.activation import ACTIVATIONS
from cats.criteria.sited import Quantiles, SitedRule, neuron_site, parts, start, watch, watch_neurons
from cats.sites import Site
from cats.structure import GatedMLP

RANKS = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1)  # of d; 0 is no centre, 1 the whole matrix
_SAMPLE = 512  # tokens for the medians, at least, where the text has so many


@dataclass
class CentredState:
    """By layer: medians of x W_gate [m], rms of x W_up [m] as weights of a neuron, samples [N, d] and second
    moments [d, d] of x, and quantiles of the scores |z - c| times the weights, by (layer, with a centre).
    """

    gates: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    moments: dict[int, Tensor] = field(default_factory=dict)
    scores: Quantiles = field(default_factory=Quantiles)
    progress: bool = True


@dataclass(eq=False)
class CentredSite(Site):
    """A site on the gate projection whose `fill` is the centre, before the activation.

    `lost` [d, d]: what factors of low rank leave out of A, taken from the MLP's output where a token drops
    any neuron; None where A is whole.
    """

    down: nn.Linear | None = None
    lost: Tensor | None = None

    def attach(self) -> None:
        super().attach()
        if self.lost is not None:
            self._handles.append(self.down.register_forward_hook(self._without))

    def _behind(self, module, args, output):
        self._x = args[0]
        return super()._behind(module, args, output)

    def _chosen(self, x: Tensor) -> Tensor:
        keep = super()._chosen(x)
        self._drops = ~keep.all(-1, keepdim=True)
        return keep

    def _without(self, _, args: tuple, output: Tensor) -> Tensor:
        return output - torch.where(self._drops, self._x @ self.lost, 0)


class Centred(SitedRule):
    """The rule `centred`: its sparsity is the share of W_up and W_down that a token does without, less A."""

    name = "centred"
    title = "CATS centred"
    what = (
        "gate activations near their neuron's median are set to it, by one threshold a layer on the distance "
        "times the neuron's rms x W_up; what they add is a product with one small matrix, paid for in neurons"
    )
    neurons = True

    def measure(self, model, batches, progress=True) -> CentredState:
        gates, inputs = {}, {}
        squares: dict[int, Tensor] = {}
        state = CentredState(progress=progress)

        def see(mlp: GatedMLP, part: str, x: Tensor) -> None:
            if part == "gate":
                gates.setdefault(mlp.layer, _Sample()).see(x)
            else:
                squares[mlp.layer] = squares.get(mlp.layer, 0) + x.float().pow(2).sum(0).double()

        def read(layer: int, x: Tensor) -> None:
            inputs.setdefault(layer, _Sample()).see(x)
            state.moments[layer] = state.moments.get(layer, 0) + x.float().t() @ x.float()

        def score(mlp: GatedMLP, _, gate: Tensor) -> None:
            for centred in (False, True):
                state.scores.see((mlp.layer, centred), self._score(mlp, state, gate, centred))

        tokens = watch_neurons(model, ("gate", "up"), batches, see, progress=progress)
        for layer, sample in gates.items():
            state.gates[layer] = sample.rows.median(0).values
            state.weights[layer] = (squares[layer] / tokens).sqrt().float()
        watch(
            model, [(mlp.layer, gate) for mlp, gate, _, _ in parts(model)], batches, read, progress=progress
        )
        state.inputs = {layer: sample.rows for layer, sample in inputs.items()}
        watch_neurons(model, ("gate",), batches, score, progress=progress)
        return state

    @torch.no_grad()
    def sites(self, model, state, sparsity):
        if not sparsity:
            return []
        places = tqdm(
            parts(model), desc="choosing ranks", unit="layer", disable=None if state.progress else True
        )
        return [self._site(mlp, up, down, state, sparsity) for mlp, _, up, down in places]

    def _site(self, mlp: GatedMLP, up: nn.Linear, down: nn.Linear, state: CentredState, sparsity: float):
        """That of the rank with the least error of the MLP's output on the sample."""
        x = state.inputs[mlp.layer].to(down.weight)
        wanted = mlp.module(x).float()
        least = chosen = None
        for share in RANKS:
            site = self._of_rank(mlp, up, down, state, sparsity, round(share * mlp.hidden_size))
            if site is None:
                continue
            site.attach()
            error = float((mlp.module(x).float() - wanted).norm())
            site.detach()
            if chosen is None or error < least:
                least, chosen = error, site
        return chosen

    def _of_rank(
        self,
        mlp: GatedMLP,
        up: nn.Linear,
        down: nn.Linear,
        state: CentredState,
        sparsity: float,
        rank: int,
    ) -> CentredSite | None:
        """None where the matrix would take all neurons that are left."""
        d, m = mlp.hidden_size, mlp.intermediate_size
        extra = min(2 * d * rank, d * d)
        dropped = sparsity + extra / (2 * d * m)
        if dropped >= 1:
            return None
        threshold = state.scores.at((mlp.layer, rank > 0), dropped)

        def keep(x: Tensor, call=None) -> Tensor:
            return ~(self._score(mlp, state, x, rank > 0) < threshold)

        site = neuron_site(mlp, "gate", keep, CentredSite, extra=extra, down=down)
        if rank:
            site.fill = state.gates[mlp.layer].to(down.weight)
            weight = up.weight.narrow(0, start(mlp, "up"), m).float()
            centre = ACTIVATIONS[mlp.activation](state.gates[mlp.layer].to(weight.device))
            whole = weight.t() @ (centre[:, None] * down.weight.float().t())
            if extra < d * d:
                site.lost = left_out(whole, state.moments[mlp.layer], rank).to(down.weight)
        return site

    @staticmethod
    def _score(mlp: GatedMLP, state: CentredState, gate: Tensor, centred: bool) -> Tensor:
        """|act(gate) - c| times the neuron's weight, fp32 [..., m]; c = 0 without a centre."""
        act = ACTIVATIONS[mlp.activation]
        z = act(gate.float())
        if centred:
            z = z - act(state.gates[mlp.layer].to(gate.device))
        return z.abs() * state.weights[mlp.layer].to(gate.device)


class _Sample:
    """Rows [_SAMPLE … 2 _SAMPLE, n] of a stream, evenly spaced, fewer where it is shorter."""

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


def left_out(matrix: Tensor, moments: Tensor, rank: int) -> Tensor:
    """`matrix` A [d, d] less its best approximation of `rank`, by the squared error of x A over inputs x of
    second moments [d, d].
    """
    outputs = matrix.t() @ moments.to(matrix) @ matrix
    rest = torch.linalg.eigh(outputs).eigenvectors[:, :-rank]
    return matrix @ rest @ rest.t()


RULE = Centred()

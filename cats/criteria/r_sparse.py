"""R-Sparse (arXiv 2504.19449): large inputs of every linear layer meet all of W, the others a W of low rank.

The weights read are a budget: columns of W for the inputs kept, and two factors of rank r. Ambiguous in the
source: how the budget is split. An evolutionary search of about an hour decides there; here each layer takes,
of a few splits, the one with the least error of its output on a sample of its inputs. Thresholds come from
one row of 512 tokens there, here from the calibration text. Large means |x_i| where there are no factors, and
|x_i| times the norm of column i of W where there are, as in the released code. That evaluates with the last
tenth of a prompt masked alone; here that is the policy of the evaluation. The factors are the truncated
singular value decomposition of W, as there, and are memory on top of W.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration.histogram import Quantiles
from cats.calibration.stream import watch
from cats.criteria.rule import register
from cats.criteria.sited import BlockLinear, InputRule, at_least, block_linears
from cats.criteria.sites import Site

SPLITS = (1.0, 0.95, 0.9, 0.8, 0.7)  # shares of the budget for columns of W; the rest is for the factors
_SAMPLE = 256  # tokens


@dataclass
class RSparseState:
    """By (layer, name): what the rule knows of each Linear W [n, k].

    `norms` [k] of its columns, `quantiles` of its inputs, `scores` of inputs times norms, `samples` of inputs
    [N, k], and the `factors` of W.
    """

    norms: dict[tuple[int, str], Tensor]
    progress: bool
    quantiles: Quantiles = field(default_factory=Quantiles)
    scores: Quantiles = field(default_factory=Quantiles)
    samples: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    factors: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)


@register
class RSparse(InputRule):
    """The rule `r-sparse`: its sparsity is the share of every layer's weights not read; factors are read."""

    name = "r-sparse"
    title = "R-Sparse (rank-aware)"
    what = "small inputs of all linear layers meet a low-rank W in place of W, within one budget of weights"

    def measure(self, model, batches, progress=True) -> RSparseState:
        linears = block_linears(model)
        norms = {linear.key: linear.module.weight.detach().float().norm(dim=0) for linear in linears}
        state = RSparseState(norms, progress)

        def see(key, x: Tensor) -> None:
            state.quantiles.see(key, x)
            state.scores.see(key, x * norms[key])
            sample = state.samples.get(key, x[:0])
            if len(sample) < _SAMPLE:
                state.samples[key] = torch.cat([sample, x[: _SAMPLE - len(sample)]])

        watch(model, [(linear.key, linear.module) for linear in linears], batches, see, progress=progress)
        return state

    def keep(self, linear, state, share):
        return at_least(state.quantiles.at(linear.key, share))

    @torch.no_grad()
    def sites(self, model, state, sparsity):
        linears = block_linears(model)
        bar = tqdm(linears, desc="low ranks", unit="layer", disable=None if state.progress else True)
        return [self.fitted_site(linear, state, sparsity) for linear in bar]

    def fitted_site(self, linear: BlockLinear, state: RSparseState, sparsity: float) -> Site:
        weight = linear.module.weight
        rows, columns = weight.shape
        most = _rank(weight, min(SPLITS))
        if linear.key not in state.factors:
            state.factors[linear.key] = low_rank(weight, most)
        left, right = state.factors[linear.key]
        x = state.samples[linear.key].float()
        best = None
        for split in SPLITS:
            rank = int((1 - sparsity) * _rank(weight, split))
            added = rank * (rows + columns)
            share = sparsity + added / weight.numel()
            if share >= 1 or (best is not None and rank == best[1]):
                continue
            keep = _weighted(linear, state, share) if rank else self.keep(linear, state, share)
            dropped = torch.where(keep(x), 0.0, x)
            error = dropped @ weight.float().t() - dropped @ left[:, :rank] @ right[:, :rank].t()
            error = float(error.norm())
            if best is None or error < best[0]:
                best = (error, rank, added, keep)
        _, rank, added, keep = best
        output = through(left[:, :rank].to(weight.dtype), right[:, :rank].to(weight.dtype)) if rank else None
        return Site(
            linear.layer,
            linear.name,
            linear.module,
            keep,
            rows,
            weights_added=added,
            dropped_output=output,
        )


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (left [k, r], right [n, r]) with x left rightᵀ ≈ x Wᵀ for weight [n, k], fp32.

    The truncated singular value decomposition, from the eigenvectors of the smaller of W Wᵀ and Wᵀ W.
    """
    matrix = weight.detach().float()
    rows, columns = matrix.shape
    gram = matrix.t() @ matrix if columns <= rows else matrix @ matrix.t()
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    if columns <= rows:
        return vectors, matrix @ vectors
    return matrix.t() @ vectors, vectors


def _rank(weight: nn.Parameter, split: float) -> int:
    """The rank that the share 1 - `split` of W's size can pay for."""
    rows, columns = weight.shape
    return int((1 - split) * rows * columns / (rows + columns))


def _weighted(linear: BlockLinear, state: RSparseState, share: float):
    keep, norms = at_least(state.scores.at(linear.key, share)), state.norms[linear.key]
    return lambda x, call=None: keep(x.float() * norms)


def through(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    """What low-rank factors make of the inputs that are dropped."""
    return lambda dropped: dropped @ left @ right.t()

"""R-Sparse (arXiv 2504.19449): large inputs of every linear layer meet all of W, the others a W of low rank.

The weights read are a budget: columns of W for the inputs kept, and two factors of rank r. Ambiguous in the
source: how the budget is split. An evolutionary search of about an hour decides there; here each layer takes,
of a few splits, the one with the least error of its output on a sample of its inputs. Thresholds come from
one row of 512 tokens there, here from the calibration text. Large means |x_i| where there are no factors, and
|x_i| times the norm of column i of W where there are, as in the released code. That evaluates with the last
tenth of a prompt masked alone; here that is the policy of the evaluation. The factors are the truncated
singular value decomposition of W, as there, and are memory on top of W.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.criteria.sited import InputRule, Place, Quantiles, at_least, linears, watch
from cats.criteria.sites import Site

SPLITS = (1.0, 0.95, 0.9, 0.8, 0.7)  # shares of the budget for columns of W; the rest is for the factors
_SAMPLE = 256  # tokens


@dataclass
class RSparseState:
    """Norms [k] of the columns of W [n, k], quantiles of inputs without and with them, samples of inputs
    [N, k] and factors of W, by (layer, name).
    """

    norms: dict[tuple[int, str], Tensor]
    progress: bool
    quantiles: Quantiles = field(default_factory=Quantiles)
    scores: Quantiles = field(default_factory=Quantiles)
    samples: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    factors: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)


class RSparse(InputRule):
    """The rule `r-sparse`: its sparsity is the share of every layer's weights not read, the factors counted
    as read.
    """

    name = "r-sparse"
    title = "R-Sparse (rank-aware)"
    what = "small inputs of all linear layers meet a low-rank W in place of W, within one budget of weights"

    def measure(self, model, batches, progress=True) -> RSparseState:
        places = linears(model)
        norms = {place.key: place.linear.weight.detach().float().norm(dim=0) for place in places}
        state = RSparseState(norms, progress)

        def see(key, x: Tensor) -> None:
            state.quantiles.see(key, x)
            state.scores.see(key, x * norms[key])
            held = state.samples.get(key, x[:0])
            if len(held) < _SAMPLE:
                state.samples[key] = torch.cat([held, x[: _SAMPLE - len(held)]])

        watch(model, [(place.key, place.linear) for place in places], batches, see, progress=progress)
        return state

    def keep(self, place, state, share):
        return at_least(state.quantiles.at(place.key, share))

    @torch.no_grad()
    def sites(self, model, state, sparsity):
        places = linears(model)
        return [
            self._site(place, state, sparsity)
            for place in tqdm(
                places, desc="low ranks", unit="layer", disable=None if state.progress else True
            )
        ]

    def _site(self, place: Place, state: RSparseState, sparsity: float) -> Site:
        weight = place.linear.weight
        rows, columns = weight.shape
        most = _rank(weight, min(SPLITS))
        if place.key not in state.factors:
            state.factors[place.key] = low_rank(weight, most)
        left, right = state.factors[place.key]
        x = state.samples[place.key].float()
        best = None
        for split in SPLITS:
            rank = int((1 - sparsity) * _rank(weight, split))
            extra = rank * (rows + columns)
            share = sparsity + extra / weight.numel()
            if share >= 1 or (best is not None and rank == best[1]):
                continue
            keep = _weighted(place, state, share) if rank else self.keep(place, state, share)
            dropped = torch.where(keep(x), 0.0, x)
            error = dropped @ weight.float().t() - dropped @ left[:, :rank] @ right[:, :rank].t()
            error = float(error.norm())
            if best is None or error < best[0]:
                best = (error, rank, extra, keep)
        _, rank, extra, keep = best
        rest = None
        if rank:
            first, second = left[:, :rank].to(weight.dtype), right[:, :rank].to(weight.dtype)
            rest = _through(first, second)
        return Site(place.layer, place.name, place.linear, keep, rows, extra=extra, rest=rest)


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


def _weighted(place: Place, state: RSparseState, share: float):
    keep, norms = at_least(state.scores.at(place.key, share)), state.norms[place.key]
    return lambda x, call=None: keep(x.float() * norms)


def _through(first: Tensor, second: Tensor):
    return lambda dropped: dropped @ first @ second.t()


RULE = RSparse()

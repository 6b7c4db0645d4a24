"""How the paper's published code finds a threshold: 0.002-wide bins over [-1, 1], the left edge of one.

Written anew from its description; it is here to be compared with exact quantiles, not to be used.
"""

import torch
from torch import Tensor

BINS = 999  # edges: -inf, 998 points from -1 to 1, +inf
WIDTH = 2 / 997


def edges() -> Tensor:
    """The 1000 edges, fp64."""
    inner = torch.linspace(-1, 1, 998, dtype=torch.float64)
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    return torch.cat([-infinity, inner, infinity])


def count(counts: Tensor, values: Tensor) -> None:
    """Add `values` [...] to `counts` [999] in place; a value on an edge may fall to either side of it."""
    scaled = values.reshape(-1).float().add(1).mul_(1 / WIDTH).add_(1).clamp_(0, BINS - 1)
    scaled.nan_to_num_(nan=BINS - 1)
    counts += torch.bincount(scaled.to(torch.int32), minlength=BINS)


def fold(signed: Tensor) -> Tensor:
    """Counts of |z| [..., 999] from counts of z: the bins lie symmetrically about zero."""
    centre = BINS // 2
    folded = torch.zeros_like(signed)
    folded[..., centre] = signed[..., centre]
    folded[..., centre + 1 :] = signed[..., centre + 1 :] + signed[..., :centre].flip(-1)
    return folded


def thresholds(counts: Tensor, sparsity: float) -> Tensor:
    """Left edge (fp64) of the first bin of counts [..., 999] of |z| whose cumulative share exceeds it."""
    share = counts.double().cumsum(-1) / counts.double().sum(-1, keepdim=True)
    wanted = torch.full((*share.shape[:-1], 1), sparsity, dtype=torch.float64)
    first = torch.searchsorted(share, wanted, right=True).clamp(max=BINS - 1)[..., 0]
    return edges()[first]

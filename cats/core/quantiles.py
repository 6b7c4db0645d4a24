"""Quantile functions on a grid: looked up between its points, and written in few characters."""

import torch
from torch import Tensor


def interpolate(grid: Tensor, values: Tensor, targets: Tensor) -> Tensor:
    """Values [..., S] (fp64) of quantile functions [..., G] at `targets`, linear between grid points."""
    grid, values = grid.double(), values.double()
    targets = targets.double().expand(*values.shape[:-1], targets.shape[-1]).contiguous()
    place = torch.searchsorted(grid, targets, right=True).clamp(1, len(grid) - 1)
    share = ((targets - grid[place - 1]) / (grid[place] - grid[place - 1])).clamp(0, 1)
    below = values.gather(-1, place - 1)
    return below + share * (values.gather(-1, place) - below)


def shortest(values: Tensor) -> list:
    """Nested lists of the shortest decimals that read back as the same fp32."""
    if values.ndim > 1:
        return [shortest(row) for row in values]
    return [float(str(value)) for value in values.float().numpy()]

"""Scores of expected loss: |z| times the mean |x W_up| |dL/dh| of the neuron, with one threshold for the
whole model."""

from functools import partial

import torch
from torch import Tensor

from cats.calibration.gradients import stream_gradients
from cats.core.thresholds import Thresholds, interpolate
from cats.criteria.rule import Fit, WeightedRule


class Fisher(WeightedRule):
    """The rule `fisher`: weights [L, m] need gradients, so calibration runs backward once a batch."""

    name = "fisher"
    title = "Loss-weighted CATS"
    what = (
        "score |z| times the neuron's mean |x W_up| |dL/d(z x W_up)|, what dropping it changes the loss by "
        "to first order; one threshold on the score for all layers, so layers get sparsities of their own"
    )

    def weights(self, model, batches, progress) -> Tensor:
        sums: dict[int, Tensor] = {}

        def see(layer: int, up: Tensor, gradient: Tensor) -> None:
            part = (up.float() * gradient.float()).abs().sum(0, dtype=torch.float32).double()
            sums[layer] = sums[layer] + part if layer in sums else part

        tokens = stream_gradients(model, batches, see, progress=progress)
        return torch.stack([sums[layer].cpu() for layer in sorted(sums)]) / tokens

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        fit = super().calibrate(model, batches, source=source, progress=progress)
        fit.allocation = partial(one_threshold, fit.thresholds)
        return fit


def one_threshold(thresholds: Thresholds, sparsity: float) -> list[float]:
    """Each layer's share of scores below the one threshold that drops the share `sparsity` of all, [L].

    Raises CatsError outside [0, 1).
    """
    thresholds.at(sparsity)
    if sparsity == 0:
        return [0.0] * thresholds.layers
    fine = torch.linspace(0, 1, 4001, dtype=torch.float64)
    quantiles = interpolate(thresholds.grid, thresholds.values, fine.expand(thresholds.layers, -1))
    low, high = 0.0, float(quantiles.max())
    for _ in range(60):
        middle = (low + high) / 2
        shares = (quantiles < middle).double().mean(1)
        low, high = (middle, high) if shares.mean() < sparsity else (low, middle)
    return settled((quantiles < high).double().mean(1), sparsity)


def settled(shares: Tensor, sparsity: float, limit: float = 0.995) -> list[float]:
    """Sparsities [L] inside [0, limit] whose mean is `sparsity`: the nearest to `shares` by a common
    shift.
    """
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (shares + middle).clamp(0, limit).mean() < sparsity else (low, middle)
    return (shares + high).clamp(0, limit).tolist()


RULE = Fisher()

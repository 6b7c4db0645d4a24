"""Scores of expected loss: |z| times the neuron's mean |x W_up| |dL/dh|, one threshold for all layers."""

from functools import partial

import torch
from torch import Tensor

from cats.calibration.gradients import stream_gradients
from cats.core.quantiles import interpolate
from cats.core.thresholds import Thresholds
from cats.criteria.allocated import allocate, shifted_to_mean
from cats.criteria.rule import ThresholdFit, WeightedRule, register


@register
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

    def calibrate(self, model, batches, *, source=None, progress=True) -> ThresholdFit:
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
    return shifted_to_mean((quantiles < high).double().mean(1), sparsity)


@register
class FisherAllocated(Fisher):
    """The rule `fisher-allocated`: the weights of `fisher`, the sparsities of `allocated`."""

    name = "fisher-allocated"
    title = "Loss-weighted CATS, allocated"
    what = "the scores of `fisher` with the allocation of `allocated`: the kernel and the bytes of CATS"

    def calibrate(self, model, batches, *, source=None, progress=True) -> ThresholdFit:
        fit = super().calibrate(model, batches, source=source, progress=progress)
        return allocate(self.name, model, fit.thresholds, batches, progress)

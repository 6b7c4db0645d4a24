"""Thresholds of least expected error in each neuron's output: t_j ~ 1 / rms(x W_up)_j near t_j."""

import torch
from torch import Tensor

from cats.calibration.calibrate import calibrate
from cats.calibration.stream import stream
from cats.criteria.allocated import allocate
from cats.criteria.rule import ThresholdFit, WeightedRule, register

_NEAR = (0.5, 1.5)  # of t_j: tokens that decide whether t_j should rise or fall
_PRIOR = 16  # tokens' worth of the neuron's overall mean square, for neurons with few such tokens
_AT = 0.5  # gate sparsity at which "near the threshold" is judged


@register
class Neuron(WeightedRule):
    """The rule `neuron`: weights [L, m] are the rms of x W_up of tokens near the threshold."""

    name = "neuron"
    title = "CATS per neuron"
    what = (
        "score |z| times the neuron's rms x W_up over tokens whose |z| is near its threshold, "
        "one threshold a layer on the score: least squared error of z (x W_up) at a given number of survivors"
    )

    def weights(self, model, batches, progress):
        return near_rms(model, batches, progress)


def near_rms(model, batches, progress: bool = True) -> Tensor:
    """rms of (x W_up)_j over tokens with |z_j| near the threshold of its layer at 50 %, fp64 [L, m].

    Dropping z_j costs (z u)_j^2, keeping it one row of W_up and of W_down whatever j is. So at the best
    thresholds the expected cost at the margin, t_j^2 E[u_j^2 | |z_j| = t_j], is the same in all of a layer.
    """
    thresholds = calibrate(model, batches, progress=progress).at(_AT)
    sums: dict[int, Tensor] = {}

    def see(layer: int, module, z: Tensor, up: Tensor) -> None:
        size = z.abs().float()
        near = (size > _NEAR[0] * thresholds[layer]) & (size < _NEAR[1] * thresholds[layer])
        squares = up.float().pow(2)
        part = torch.stack(
            [squares.sum(0), (squares * near).sum(0), near.sum(0, dtype=torch.float32)]
        ).double()
        sums[layer] = sums[layer] + part if layer in sums else part

    tokens = stream(model, batches, see, progress=progress)
    weights = []
    for layer in sorted(sums):
        overall, at_margin, count = sums[layer].cpu()
        weights.append(((at_margin + _PRIOR * overall / tokens) / (count + _PRIOR)).sqrt())
    return torch.stack(weights)


@register
class Combined(Neuron):
    """The rule `combined`: the weights of `neuron`, the sparsities of `allocated`."""

    name = "combined"
    title = "CATS per neuron, allocated"
    what = "the thresholds of `neuron` with the allocation of `allocated`: the kernel and the bytes of CATS"

    def calibrate(self, model, batches, *, source=None, progress=True) -> ThresholdFit:
        fit = super().calibrate(model, batches, source=source, progress=progress)
        return allocate(self.name, model, fit.thresholds, batches, progress)

"""Thresholds per neuron after CHESS (EMNLP 2024): the layer's over the neuron's mean of |x W_up|."""

import torch
from torch import Tensor

from cats.calibration.stream import stream
from cats.criteria.rule import WeightedRule, register


@register
class Chess(WeightedRule):
    """The rule `chess`: weights [L, m] are the means of |x W_up| over the calibration tokens."""

    name = "chess"
    title = "CHESS rule"
    what = "score |z| times the neuron's mean |x W_up|, one threshold a layer on the score (CHESS)"

    def weights(self, model, batches, progress) -> Tensor:
        sums: dict[int, Tensor] = {}

        def see(layer: int, module, z: Tensor, up: Tensor) -> None:
            sums[layer] = sums.get(layer, 0) + up.abs().sum(0, dtype=torch.float32).double()

        tokens = stream(model, batches, see, progress=progress)
        return torch.stack([sums[layer].cpu() for layer in sorted(sums)]) / tokens

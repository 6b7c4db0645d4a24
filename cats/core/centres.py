"""What the rule `centred` adds to thresholds: centres, weights and scores, for every sparsity."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cats.core.activation import ACTIVATIONS
from cats.core.quantiles import interpolate, shortest
from cats.core.structure import GatedMLP
from cats.errors import CatsError

# Sparsities at which the errors with and without centres are compared; between them the ratio is linear.
COMPARED_AT = torch.tensor([k / 20 for k in range(1, 20)], dtype=torch.float32)
_HALF = np.dtype("<f2")


class Setting(NamedTuple):
    """How one layer is masked: `threshold`, fp32, [] or [m], and `centre`, fp32 [m] or None for zero."""

    threshold: Tensor
    centre: Tensor | None = None


@dataclass
class Centres:
    """Medians, weights and scores of each layer; a neuron's score is |z - c| times its weight.

    `gates` and `weights`, by layer, fp32 [m] of 16 bits' precision: medians of x W_gate, with the centre
    c = act(median), and rms of x W_up over the layer's mean. `values` [L, G]: quantiles of the scores, on the
    grid of the thresholds, whose own values are those of |z| times the weight. `hidden_sizes` [L]. `errors`
    [L, S]: error of a layer's output with centres over that without, at the sparsities COMPARED_AT.
    """

    gates: list[Tensor]
    weights: list[Tensor]
    values: Tensor
    hidden_sizes: list[int]
    errors: Tensor

    def overhead(self, layer: int) -> float:
        """What a token reads for A [d, d] of a layer, as a share of the layer's W_up and W_down."""
        return self.hidden_sizes[layer] / (2 * len(self.gates[layer]))

    def pays(self, layer: int, sparsity: float) -> bool:
        """Whether the layer's output on the calibration text is nearer to the dense one with centres."""
        at = torch.tensor([sparsity], dtype=torch.float64, device="cpu")
        return bool(interpolate(COMPARED_AT, self.errors[layer], at)[0] < 1)

    def centred(self, layer: int, sparsity: float) -> bool:
        """Whether a layer has centres at `sparsity`: they pay, and A leaves neurons to read."""
        return 0 < sparsity < 1 - self.overhead(layer) and self.pays(layer, sparsity)

    def setting(
        self, layer: int, sparsity: float, grid: Tensor, plain: Tensor, activation: str, centred: bool
    ) -> Setting:
        """The mask of one layer, with centres or without; `grid` and `plain` [L, G] of the thresholds."""
        weights = self.weights[layer]
        if sparsity == 0:
            return Setting(torch.zeros_like(weights))
        values, share = plain, sparsity
        if centred:
            values, share = self.values, sparsity + self.overhead(layer)  # A is paid for by neurons
        score = interpolate(grid, values[layer], torch.tensor([share], dtype=torch.float64, device="cpu"))
        centre = ACTIVATIONS[activation](self.gates[layer]) if centred else None
        return Setting(score.float() / weights, centre)

    def check(self, mlps: Sequence[GatedMLP], name: str) -> None:
        """Raise CatsError unless every layer has the sizes of the MLP that it is for."""
        for mlp, gates, hidden in zip(mlps, self.gates, self.hidden_sizes, strict=True):
            if (len(gates), hidden) != (mlp.intermediate_size, mlp.hidden_size):
                raise CatsError(
                    f"These centres are for sizes {hidden} and {len(gates)} in layer {mlp.layer} ({name}), "
                    f"the model has {mlp.hidden_size} and {mlp.intermediate_size}."
                )

    def consistent(self, layers: int, points: int) -> bool:
        """Whether every part is there for so many layers, and can be what it is said to be."""
        numbers = [*self.gates, *self.weights, self.values, self.errors]
        return (
            len(self.gates) == len(self.weights) == len(self.hidden_sizes) == layers
            and all(a.shape == b.shape and len(a) for a, b in zip(self.gates, self.weights, strict=True))
            and all(type(size) is int and size > 0 for size in self.hidden_sizes)
            and self.values.shape == (layers, points)
            and self.errors.shape == (layers, len(COMPARED_AT))
            and all(bool(part.isfinite().all()) for part in numbers)
            and all(bool((part > 0).all()) for part in self.weights)
            and bool(
                (self.values >= 0).all() and (self.values.diff() >= 0).all() and (self.errors >= 0).all()
            )
        )

    def document(self) -> dict:
        """What a thresholds file keeps: numbers, and per neuron base64 of 16-bit floats, little-endian."""
        return {
            "hidden_sizes": self.hidden_sizes,
            "errors": shortest(self.errors),
            "values": shortest(self.values),
            "gates": [_text(part) for part in self.gates],
            "weights": [_text(part) for part in self.weights],
        }


def decoded(texts: list) -> list[Tensor]:
    """The fp32 numbers that `Centres.document` wrote as texts; ValueError for anything else."""
    if any(type(text) is not str for text in texts):
        raise ValueError("numbers of neurons are not text")
    data = (base64.b64decode(text, validate=True) for text in texts)
    return [torch.from_numpy(np.frombuffer(part, dtype=_HALF).astype(np.float32)) for part in data]


def _text(part: Tensor) -> str:
    return base64.b64encode(part.numpy().astype(_HALF).tobytes()).decode("ascii")

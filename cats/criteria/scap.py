"""SCAP (arXiv 2412.07174): inputs of the MLP's three layers near their mode are set to it; the mode's part of
the output is a constant, a bias.

Ambiguous in the source: the mode may be zero, a median or the peak of a kernel density estimate, by tensor;
here it is the peak for each input, with a Gaussian kernel of Silverman's width on a sample. Its published
settings for Llama-2-7B and Mistral-7B have a mode of zero, and give up and gate another sparsity than down,
by hand; here all three have one. Its three layers are not all linear weights: model-level sparsity is the
MLP's share of it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cats.calibration.histogram import Quantiles
from cats.calibration.stream import watch
from cats.core.structure import find_gated_mlps
from cats.criteria.rule import register
from cats.criteria.sited import SitedRule, at_least
from cats.criteria.sites import Site

_SAMPLE = 1 << 14  # values of one call of a layer
_BINS = 1024


@dataclass
class ScapState:
    """Modes of inputs, and quantiles of the distance from them, by (layer, "input" or "down")."""

    modes: dict[tuple[int, str], float]
    distances: Quantiles = field(default_factory=Quantiles)


@register
class Scap(SitedRule):
    """The rule `scap`: its sparsity is the share of inputs dropped of gate, up and down."""

    name = "scap"
    title = "SCAP (mode-centred)"
    what = "inputs of gate, up and down near their mode are set to it, below a quantile of the distance"

    def max_model_sparsity(self, shape):
        return shape.mlp_weights / shape.block_weights

    def measure(self, model, batches, progress=True) -> ScapState:
        modules = [
            item
            for mlp in find_gated_mlps(model)
            for item in (((mlp.layer, "input"), mlp.gate), ((mlp.layer, "down"), mlp.down))
        ]
        samples: dict[Any, list[Tensor]] = {}

        def sample(key, x: Tensor) -> None:
            flat = x.flatten()
            stride = max(1, len(flat) // _SAMPLE)
            while math.gcd(stride, x.shape[-1]) > 1:  # or the same columns would be met again and again
                stride += 1
            samples.setdefault(key, []).append(flat[::stride].float().cpu())

        watch(model, modules, batches, sample, progress=progress)
        state = ScapState({key: mode(torch.cat(values)) for key, values in samples.items()})
        watch(
            model,
            modules,
            batches,
            lambda key, x: state.distances.see(key, x.float() - state.modes[key]),
            progress=progress,
        )
        return state

    def sites(self, model, state, sparsity):
        result = []
        for mlp in find_gated_mlps(model):
            names = {
                mlp.gate: "gate",
                mlp.up: "up",
                mlp.down: "down",
            }  # one entry for gate and up where they are fused
            for linear, name in names.items():
                key = (mlp.layer, "down" if name == "down" else "input")
                centre = state.modes[key]
                keep = at_least(state.distances.at(key, sparsity), centre)
                result.append(Site(mlp.layer, name, linear, keep, linear.out_features, fill=centre))
        return result


def mode(values: Tensor) -> float:
    """Where a kernel density estimate of `values` [N] peaks."""
    values = values.double()
    low, q1, q3, high = torch.quantile(
        values[:: max(1, len(values) >> 20)], torch.tensor([0.001, 0.25, 0.75, 0.999], dtype=torch.float64)
    ).tolist()
    if high <= low:
        return low
    spread = min(float(values.std()), (q3 - q1) / 1.349) or float(values.std())
    width = 0.9 * spread * len(values) ** -0.2
    low, high = max(low, q1 - 3 * (q3 - q1)), min(high, q3 + 3 * (q3 - q1))  # the peak is not in the tails
    if high <= low:
        return low
    counts = torch.histc(values.float(), _BINS, low, high).double()
    centres = low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (high - low) / _BINS
    kernel = torch.exp(-0.5 * ((centres[:, None] - centres[None]) / width) ** 2)
    return float(centres[(kernel @ counts).argmax()])

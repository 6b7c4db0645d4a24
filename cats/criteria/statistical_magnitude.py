"""Statistical top-k on magnitudes: a token's threshold is the mean of its |z| plus a calibrated number of
their standard deviations.

A second reading of the Spark Transformer's rule (see `statistical_top_k`), for models that were not trained
with it: their small activations lie around zero, not at the lower end. Magnitudes are not Gaussian, so the
number of deviations is a quantile over calibration text, one for each layer, in place of Φ⁻¹.
"""

from torch import Tensor

from cats.calibration.histogram import Quantiles
from cats.calibration.stream import watch_neurons
from cats.core.activation import ACTIVATIONS
from cats.core.structure import GatedMLP, find_gated_mlps
from cats.criteria.rule import register
from cats.criteria.sited import SitedRule, neuron_site

_SHIFT = 4.0  # deviations; makes standings positive: a half-normal |z| is at least 1.3 below its mean at 0


@register
class StatisticalMagnitude(SitedRule):
    """The rule `statistical-magnitude`: its sparsity is the share of gate activations zeroed."""

    name = "statistical-magnitude"
    title = "Statistical top-k on |z|"
    what = "of each token, gate activations are zeroed whose |z| is low in deviations from the token's mean"
    neurons = True

    def measure(self, model, batches, progress=True) -> Quantiles:
        standings = Quantiles()

        def see(mlp: GatedMLP, _, gate: Tensor) -> None:
            standings.see(mlp.layer, standing(ACTIVATIONS[mlp.activation](gate.float())))

        watch_neurons(model, ("gate",), batches, see, progress=progress)
        return standings

    def sites(self, model, state, sparsity):
        return [
            neuron_site(mlp, "gate", _keep(ACTIVATIONS[mlp.activation], state.at(mlp.layer, sparsity)))
            for mlp in find_gated_mlps(model)
        ]


def standing(z: Tensor) -> Tensor:
    """(|z| - mean) / standard deviation + _SHIFT of each of z [..., m], over the last dimension."""
    magnitudes = z.abs()
    spread = magnitudes.std(-1, keepdim=True, correction=0).clamp_min(1e-30)
    return ((magnitudes - magnitudes.mean(-1, keepdim=True)) / spread + _SHIFT).clamp_min(0)


def _keep(act, threshold: float):
    return lambda gate, call: ~(standing(act(gate.float())) < threshold)

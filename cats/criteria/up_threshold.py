"""Thresholds on |x W_up| in place of the gate, after FloE (arXiv 2505.05950) and COUNTDOWN (arXiv
2505.17701): W_up is read whole, and of W_gate and W_down the rows that survive.

Ambiguous in the sources: FloE masks the experts of a mixture; here there is one threshold for each layer, the
quantile over all tokens of the calibration text. M-COUNTDOWN ranks |x W_up| too; how it sets thresholds was
not at hand. D-COUNTDOWN ranks the product with a trained predictor, which is not here.
"""

from cats.calibration.histogram import Quantiles
from cats.calibration.stream import watch_neurons
from cats.core.structure import find_gated_mlps
from cats.criteria.rule import register
from cats.criteria.sited import SitedRule, at_least, neuron_site


@register
class UpThreshold(SitedRule):
    """The rule `up-threshold`: its sparsity is the share of neurons dropped, at the bytes of CATS."""

    name = "up-threshold"
    title = "Up-projection threshold (FloE, COUNTDOWN)"
    what = "neurons with |x W_up| below the layer's quantile are dropped, W_gate and W_down skip them"
    neurons = True

    def measure(self, model, batches, progress=True) -> Quantiles:
        state = Quantiles()
        watch_neurons(model, ("up",), batches, lambda mlp, _, up: state.see(mlp.layer, up), progress=progress)
        return state

    def sites(self, model, state, sparsity):
        return [
            neuron_site(mlp, "up", at_least(state.at(mlp.layer, sparsity))) for mlp in find_gated_mlps(model)
        ]

"""Statistical top-k after the Spark Transformer (arXiv 2506.06644): a token's threshold is the mean of its
pre-activations plus Φ⁻¹(share) of their standard deviations; nothing is calibrated, nothing sorted.

Ambiguous in the source, which trains with the rule from the start: it keeps x - threshold (a soft threshold);
a model trained without would lose the scale of what is left, so here x is kept as it is. It ranks
pre-activations with their sign, as here, and so drops the most negative ones first, where SiLU is not the
smallest. It reads a part of the input to predict them; here they are x W_gate. Where they are not Gaussian,
the share that it drops is off the target: the realised one is measured beside it.
"""

from statistics import NormalDist

from cats.core.structure import find_gated_mlps
from cats.criteria.rule import register
from cats.criteria.sited import SitedRule, neuron_site


@register
class StatisticalTopK(SitedRule):
    """The rule `statistical-top-k`: its sparsity is the share of gate activations to zero."""

    name = "statistical-top-k"
    title = "Statistical top-k (Spark Transformer)"
    what = "of each token, x W_gate below its mean plus a multiple of its standard deviation is zeroed"
    neurons = True

    def measure(self, model, batches=None, progress=True) -> None:
        """Nothing: no text is read."""

    def sites(self, model, state, sparsity):
        keep = _keep(sparsity)
        return [neuron_site(mlp, "gate", keep) for mlp in find_gated_mlps(model)]


def _keep(share: float):
    deviations = NormalDist().inv_cdf(share) if share > 0 else float("-inf")

    def keep(gate, call=None):
        values = gate.float()
        mean, spread = values.mean(-1, keepdim=True), values.std(-1, keepdim=True, correction=0)
        return ~(values < mean + spread * deviations)

    return keep

"""Exact top-k by token: of each token, the gate activations z of largest magnitude are kept, always as many.

The rule of CATS with the threshold chosen anew by each token, to which WINA and Sirius moved because fixed
thresholds miss the target on other text. Ambiguous in the sources: which of equal magnitudes go (here the
first), and whether z or z times x W_up is ranked (here z, which is known before W_up is read).
"""

from cats.core.activation import ACTIVATIONS
from cats.core.structure import find_gated_mlps
from cats.criteria.rule import register
from cats.criteria.sited import SitedRule, drop_lowest, neuron_site


@register
class TopK(SitedRule):
    """The rule `top-k`: its sparsity is the share of gate activations zeroed, of every token."""

    name = "top-k"
    title = "Exact top-k by token"
    what = "of each token, the same number of gate activations is zeroed, those of lowest magnitude"
    neurons = True

    def measure(self, model, batches=None, progress=True) -> None:
        """Nothing: no text is read."""

    def sites(self, model, state, sparsity):
        return [
            neuron_site(mlp, "gate", _keep(ACTIVATIONS[mlp.activation], sparsity))
            for mlp in find_gated_mlps(model)
        ]


def _keep(act, share: float):
    return lambda gate, call: drop_lowest(act(gate.float()).abs(), share)

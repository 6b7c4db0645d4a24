"""`refit` on the masks of `combined`."""

from cats.criteria.combined import Combined
from cats.criteria.refit import Refit


class RefitCombined(Refit, Combined):
    """The rule `refit-combined`."""

    name = "refit-combined"
    title = "CATS fitted"
    what = "`refit` with the masks of `combined`: thresholds per neuron, a sparsity per layer"


RULE = RefitCombined()

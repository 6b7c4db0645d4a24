"""`refit`, with half of the error of the blocks before taken back as well."""

from cats.criteria.refit import Refit


class RefitDrift(Refit):
    """The rule `refit-drift`."""

    name = "refit-drift"
    title = "CATS per neuron, W_down fitted to the dense stream"
    what = "`refit`, whose W_down also takes back half of the error that reaches the block"
    drift = 0.5


RULE = RefitDrift()

"""Thresholds per neuron after CHESS (EMNLP 2024): the layer's divided by the mean of |x W_up| of the
neuron."""

from cats.calibration.calibrate import neuron_means
from cats.criteria.rule import WeightedRule


class Chess(WeightedRule):
    """The rule `chess`: weights [L, m] are the means of |x W_up| over the calibration tokens."""

    name = "chess"
    title = "CHESS rule"
    what = "score |z| times the neuron's mean |x W_up|, one threshold a layer on the score (CHESS)"

    def weights(self, model, batches, progress):
        return neuron_means(model, batches, progress=progress).up


RULE = Chess()

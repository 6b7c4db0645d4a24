"""CATS itself: one threshold a layer, the quantile of |z| (paper eq. 5 and sec. 4.1)."""

from cats.calibration.calibrate import calibrate
from cats.core.thresholds import Thresholds
from cats.criteria.rule import Rule, ThresholdFit, register


@register
class Cats(Rule):
    """The rule `cats`: the paper's, which the others are compared with."""

    name = "cats"
    title = "CATS"
    what = "one threshold a layer, the quantile of |act(x W_gate)| (the paper)"

    def calibrate(self, model, batches, *, source=None, progress=True) -> ThresholdFit:
        return self.from_thresholds(calibrate(model, batches, source=source, progress=progress))

    def from_thresholds(self, thresholds: Thresholds) -> ThresholdFit:
        """The fit that a thresholds file gives, without any text."""
        return ThresholdFit(self.name, thresholds)

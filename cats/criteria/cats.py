"""CATS itself: one threshold a layer, the quantile of |z| (paper eq. 5 and sec. 4.1)."""

from cats.calibration.calibrate import calibrate
from cats.criteria.rule import Fit, Rule


class Cats(Rule):
    """The rule `cats`: the paper's, against which the others are held."""

    name = "cats"
    title = "CATS"
    what = "one threshold a layer, the quantile of |act(x W_gate)| (the paper)"

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        return Fit(self.name, calibrate(model, batches, source=source, progress=progress))


RULE = Cats()

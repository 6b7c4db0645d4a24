"""Magnitude pruning of static weights, the simplest baseline of all."""

from cats.criteria.pruning import PrunedFit, blocks
from cats.criteria.rule import Fit, Rule


class Magnitude(Rule):
    """The rule `magnitude`: zeroes the smallest static weights; no activation is masked."""

    name = "magnitude"
    title = "Magnitude (static weights)"
    what = "the weights of lowest magnitude are zero, in every linear layer"
    thresholds = trains = False

    def check(self, model) -> None:
        blocks(model)

    def reach(self, shape):
        return 1.0

    def calibrate(self, model, batches=(), *, source=None, progress=True) -> Fit:
        return PrunedFit(
            self.name,
            None,
            batches=[],
            score=lambda weight, norms: weight.abs(),
            by_row=False,
            progress=progress,
        )


RULE = Magnitude()

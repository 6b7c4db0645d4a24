"""Wanda (arXiv 2306.11695) on static weights, which the paper's rebuttal compares CATS with."""

from cats.criteria.pruning import PrunedFit, blocks
from cats.criteria.rule import Fit, Rule


class Wanda(Rule):
    """The rule `wanda`: zeroes static weights of small |w| times input norm; nothing is masked."""

    name = "wanda"
    title = "Wanda (static weights)"
    what = (
        "the weights of lowest |W| times the norm of their input are zero, in each row of every linear layer"
    )
    thresholds = trains = False

    def check(self, model) -> None:
        blocks(model)

    def reach(self, shape):
        return 1.0

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        return PrunedFit(
            self.name,
            None,
            batches=list(batches),
            score=lambda weight, norms: weight.abs() * norms,
            progress=progress,
            source={key: value for key, value in (source or {}).items() if key != "model"},
        )


RULE = Wanda()

"""CATS with the first and the last layer dense, the others sparser for it, so that the bytes stay equal."""

from functools import partial

from cats.calibration.calibrate import calibrate
from cats.core.structure import find_gated_mlps
from cats.criteria.rule import Rule, ThresholdFit, register
from cats.errors import CatsError


@register
class DenseEnds(Rule):
    """The rule `dense-ends`: refuses a sparsity that the layers between cannot make up for."""

    name = "dense-ends"
    title = "CATS, dense ends"
    what = "CATS, but the first and the last layer stay dense and the others make up for it"

    def check(self, model) -> None:
        layers = len(find_gated_mlps(model))
        if layers < 3:
            raise CatsError(f"dense-ends needs three layers at least, this model has {layers}: use cats.")

    def calibrate(self, model, batches, *, source=None, progress=True) -> ThresholdFit:
        self.check(model)
        thresholds = calibrate(model, batches, source=source, progress=progress)
        return ThresholdFit(self.name, thresholds, partial(ends_dense, thresholds.layers))


def ends_dense(layers: int, sparsity: float) -> list[float]:
    """Sparsity 0 at both ends and one for the rest, of mean `sparsity`; CatsError where that is above 1."""
    inner = sparsity * layers / (layers - 2)
    if inner >= 1:
        raise CatsError(
            f"With dense ends, {layers} layers cannot reach a gate sparsity of {sparsity:g}: "
            f"stay below {(layers - 2) / layers:.2f}."
        )
    return [0.0, *[inner] * (layers - 2), 0.0]

"""The weights of `fisher` within each layer, and layers by measured divergence."""

from cats.criteria.allocated import allocate
from cats.criteria.fisher import Fisher
from cats.criteria.rule import Fit


class FisherAllocated(Fisher):
    """The rule `fisher-allocated`: the weights of `fisher`, the sparsities of `allocated`."""

    name = "fisher-allocated"
    title = "Loss-weighted CATS, allocated"
    what = "the scores of `fisher` with the allocation of `allocated`: the kernel and the bytes of CATS"

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        fit = super().calibrate(model, batches, source=source, progress=progress)
        return allocate(self.name, model, fit.thresholds, batches, progress)


RULE = FisherAllocated()

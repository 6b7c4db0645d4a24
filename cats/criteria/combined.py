"""Thresholds per neuron and a sparsity per layer together, at the bytes of CATS."""

from cats.criteria.allocated import allocate
from cats.criteria.neuron import Neuron
from cats.criteria.rule import Fit


class Combined(Neuron):
    """The rule `combined`: the weights of `neuron`, the sparsities of `allocated`."""

    name = "combined"
    title = "CATS per neuron, allocated"
    what = "the thresholds of `neuron` with the allocation of `allocated`: the kernel and the bytes of CATS"

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        fit = super().calibrate(model, batches, source=source, progress=progress)
        return allocate(self.name, model, fit.thresholds, batches, progress)


RULE = Combined()

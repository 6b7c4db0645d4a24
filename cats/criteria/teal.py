"""TEAL (arXiv 2408.14690): small inputs of all linear layers are dropped, one threshold for each input.

Ambiguous in the source: the released code takes the threshold from a two-sided histogram of 10,000 bins and
assumes inputs of one mode and mean zero; here it is the quantile of |x| itself. Released evaluations
mask a part of the prompt only; here that is the policy of the evaluation, by default every token. Where q, k
and v read one input they share its quantile. `teal-greedy` allocates shares as `greedy` says.
"""

from torch import nn

from cats.calibration.histogram import Quantiles
from cats.calibration.stream import watch
from cats.criteria.greedy import GreedyRule
from cats.criteria.rule import register
from cats.criteria.sited import InputRule, at_least, block_linears


@register
class Teal(InputRule):
    """The rule `teal`: the same share of the inputs of every linear layer."""

    name = "teal"
    title = "TEAL (uniform)"
    what = "inputs of all linear layers below a quantile of their magnitude are dropped (TEAL)"

    def measure(self, model: nn.Module, batches, progress: bool) -> Quantiles:
        return input_quantiles(model, batches, progress)

    def keep(self, linear, state, share):
        return at_least(state.at(linear.key, share))


def input_quantiles(model: nn.Module, batches, progress: bool = True) -> Quantiles:
    """Quantiles of |x| of every Linear of the blocks, by (layer, name)."""
    inputs = Quantiles()
    linears = [(linear.key, linear.module) for linear in block_linears(model)]
    watch(model, linears, batches, inputs.see, progress=progress)
    return inputs


@register
class TealGreedy(GreedyRule):
    """The rule `teal-greedy`."""

    name = "teal-greedy"
    title = "TEAL (block-wise greedy)"
    what = "TEAL, the shares of a block's linear layers allocated greedily by the error of its output"
    base = Teal()

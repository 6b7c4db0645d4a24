"""TEAL (arXiv 2408.14690): small inputs of all linear layers are dropped, one threshold for each input.

Ambiguous in the source: the released code takes the threshold from a two-sided histogram of 10,000 bins and
assumes inputs of one mode and mean zero; here it is the quantile of |x| itself. Released evaluations
mask a part of the prompt only; here that is the policy of the evaluation, by default every token. Where q, k
and v read one input they share its quantile.
"""

from torch import nn

from cats.criteria.sited import InputRule, Quantiles, at_least, linears, watch


class Teal(InputRule):
    """The rule `teal`: the same share of the inputs of every linear layer."""

    name = "teal"
    title = "TEAL (uniform)"
    what = "inputs of all linear layers below a quantile of their magnitude are dropped (TEAL)"

    def measure(self, model: nn.Module, batches, progress: bool) -> Quantiles:
        return input_quantiles(model, batches, progress)

    def keep(self, place, state, share):
        return at_least(state.at(place.key, share))


def input_quantiles(model: nn.Module, batches, progress: bool = True) -> Quantiles:
    """Quantiles of |x| of every Linear of the blocks, by (layer, name)."""
    found = Quantiles()
    watch(
        model,
        [(place.key, place.linear) for place in linears(model)],
        batches,
        found.see,
        progress=progress,
    )
    return found


RULE = Teal()

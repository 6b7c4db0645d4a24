"""WINA (arXiv 2505.19427) as the paper has it: of each token, the inputs with the lowest |x_i| times the norm
of the weights that they meet are dropped, in all linear layers.

Ambiguous in the source: the paper turns W by an orthogonal matrix from its singular vectors first, so that
its columns are orthogonal, as the theorem asks; the weights stay as they are here, and the score is the
paper's on them. A threshold is offered as an alternative there; the default is the exact number a token, as
here. Its experiments allocate shares by TEAL's greedy search, here `wina-greedy`. The released code takes the
norm for gate and k alone: `wina-released`. Norms are read at decode too, one number an input (< 0.1 % of a
layer's bytes), and are not counted.
"""

from torch import Tensor, nn

from cats.criteria.sited import InputRule, Place, drop_lowest, linears


class Wina(InputRule):
    """The rule `wina`: the same share of the inputs of every linear layer."""

    name = "wina"
    title = "WINA (uniform)"
    what = "of each token, the inputs of lowest |x_i| times the norm of column i of W are dropped (WINA)"

    def measure(self, model: nn.Module, batches=None, progress: bool = True) -> dict[tuple[int, str], Tensor]:
        """The norm [k] of each column of every Linear's weight [n, k]; no text is read."""
        return {place.key: self.norms(place) for place in linears(model)}

    def norms(self, place: Place) -> Tensor:
        return place.linear.weight.detach().float().norm(dim=0)

    def keep(self, place, state, share):
        return lambda x, call: drop_lowest(x.abs().float() * state[place.key], share)


RULE = Wina()

"""WINA (arXiv 2505.19427) as the paper has it: of each token, the inputs with the lowest |x_i| times the norm
of the weights that they meet are dropped, in all linear layers.

Ambiguous in the source: the paper turns W by an orthogonal matrix from its singular vectors first, so that
its columns are orthogonal, as the theorem asks; the weights stay as they are here, and the score is the
paper's on them. A threshold is offered as an alternative there; the default is the exact number a token, as
here. Its experiments allocate shares by TEAL's greedy search, here `wina-greedy`. The released code takes the
norm for gate and k alone: `wina-released`. Norms are read at decode too, one number an input (< 0.1 % of a
layer's bytes), and are not counted.

`wina-released` is WINA as that code computes it: the norms of q, v, o, up and down are the constant 1, so
that they are dropped by magnitude; the number a token is exact, and shares are allocated greedily. Ambiguous
in the source: whether the other norms are left out on purpose; its optional turn of W, off by default and
left out here, serves k and gate alone too. A model that fuses k or gate with others has no such reading.
"""

import torch
from torch import Tensor, nn

from cats.criteria.greedy import GreedyRule
from cats.criteria.rule import register
from cats.criteria.sited import BlockLinear, InputRule, block_linears, drop_lowest
from cats.errors import CatsError


@register
class Wina(InputRule):
    """The rule `wina`: the same share of the inputs of every linear layer."""

    name = "wina"
    title = "WINA (uniform)"
    what = "of each token, the inputs of lowest |x_i| times the norm of column i of W are dropped (WINA)"

    def measure(self, model: nn.Module, batches=None, progress: bool = True) -> dict[tuple[int, str], Tensor]:
        """The norm [k] of each column of every Linear's weight [n, k]; no text is read."""
        return {linear.key: self.norms(linear) for linear in block_linears(model)}

    def norms(self, linear: BlockLinear) -> Tensor:
        return linear.module.weight.detach().float().norm(dim=0)

    def keep(self, linear, state, share):
        return lambda x, call: drop_lowest(x.abs().float() * state[linear.key], share)


@register
class WinaGreedy(GreedyRule):
    """The rule `wina-greedy`."""

    name = "wina-greedy"
    title = "WINA (block-wise greedy)"
    what = "WINA, the shares of a block's linear layers allocated greedily by the error of its output"
    base = Wina()


class _GateAndKey(Wina):
    name = "wina-released"

    def check(self, model) -> None:
        super().check(model)
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        if not {"k_proj", "gate_proj"} <= names:
            raise CatsError(
                f"wina-released does not apply to {type(model).__name__}, which has no k_proj and gate_proj "
                "or has them fused with others: use wina."
            )

    def norms(self, linear):
        if linear.name.rpartition(".")[2] in ("k_proj", "gate_proj"):
            return super().norms(linear)
        return torch.ones((), device=linear.module.weight.device)


@register
class WinaReleased(GreedyRule):
    """The rule `wina-released`."""

    name = "wina-released"
    title = "WINA (as released)"
    what = "as WINA with greedy allocation, but with norms for gate and k alone, as the released code has it"
    base = _GateAndKey()

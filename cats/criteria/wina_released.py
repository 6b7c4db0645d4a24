"""WINA as its released code computes it: the norm of the weights counts for gate and k alone.

The norms of q, v, o, up and down are the constant 1 there, so that they are dropped by magnitude; the number
a token is exact, and shares are allocated greedily, as in the released evaluation. Ambiguous in the source:
whether the other norms are left out on purpose; its optional turn of W, off by default and left out here,
serves k and gate alone too. A model that fuses k or gate with others has no such reading.
"""

import torch

from cats.criteria.greedy import GreedyRule
from cats.criteria.wina import Wina
from cats.errors import CatsError


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

    def norms(self, place):
        if place.name.rpartition(".")[2] in ("k_proj", "gate_proj"):
            return super().norms(place)
        return torch.ones((), device=place.linear.weight.device)


class WinaReleased(GreedyRule):
    """The rule `wina-released`."""

    name = "wina-released"
    title = "WINA (as released)"
    what = "as WINA with greedy allocation, but with norms for gate and k alone, as the released code has it"
    base = _GateAndKey()


RULE = WinaReleased()

"""TEAL with its block-wise greedy allocation, sizes as the model has them; readings as in `teal` and
`greedy`."""

from cats.criteria.greedy import GreedyRule
from cats.criteria.teal import RULE as TEAL


class TealGreedy(GreedyRule):
    """The rule `teal-greedy`."""

    name = "teal-greedy"
    title = "TEAL (block-wise greedy)"
    what = "TEAL, the shares of a block's linear layers allocated greedily by the error of its output"
    base = TEAL


RULE = TealGreedy()

"""WINA with TEAL's greedy allocation, as the paper evaluates it; readings as in `wina` and `greedy`."""

from cats.criteria.greedy import GreedyRule
from cats.criteria.wina import RULE as WINA


class WinaGreedy(GreedyRule):
    """The rule `wina-greedy`."""

    name = "wina-greedy"
    title = "WINA (block-wise greedy)"
    what = "WINA, the shares of a block's linear layers allocated greedily by the error of its output"
    base = WINA


RULE = WinaGreedy()

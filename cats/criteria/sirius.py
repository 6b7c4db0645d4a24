"""Sirius (arXiv 2409.03856): CATS generates, and every few tokens the dense model corrects it.

Ambiguous in the source: its sparse model ranks |SiLU(x W_gate)| by token, here CATS has its thresholds, so
that what the correction adds is seen alone; its tree of candidates is left out; the period (16 there) and
the least likelihood (0.1 in its instructions) are options there and fixed here. As in its code, likelihood
is at temperature 0.6, a round's last token is always the dense model's, and so is the reading of the prompt,
whatever the policy says. A dense step reads all weights once, for the tokens of a whole round. Likelihood
tasks generate nothing: there it is CATS.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from cats.calibration.calibrate import calibrate
from cats.core.accounting import Accounting
from cats.correction import continue_corrected
from cats.criteria.rule import Fit, Rule

PERIOD = 16  # tokens, one of them by the dense model
LIKELIHOOD = 0.1
TEMPERATURE = 0.6


@dataclass
class SiriusFit(Fit):
    """As a Fit; generation is corrected, and its steps are counted."""

    counts: Counter = field(default_factory=Counter)

    def continuing(self, sparsity: float) -> Callable:
        return partial(
            continue_corrected,
            period=PERIOD,
            likelihood=LIKELIHOOD,
            temperature=TEMPERATURE,
            counts=self.counts,
        )

    def counted(self) -> dict[str, int]:
        names = ("sparse_steps", "dense_steps", "tokens")
        found = {f"corrected_{name}": self.counts[name] for name in names}
        self.counts.clear()
        return found

    def model_sparsity(self, shape: Accounting, sparsity: float) -> float:
        """At most: a dense step for every round of PERIOD tokens, none of them undone."""
        return shape.model_sparsity(sparsity) * (PERIOD - 1) / PERIOD

    def bytes_per_token(self, shape: Accounting, sparsity: float, bytes_per_weight: float = 2) -> float:
        """At least, as `model_sparsity`."""
        dense = shape.bytes_per_token(bytes_per_weight=bytes_per_weight)
        return ((PERIOD - 1) * shape.bytes_per_token(sparsity, bytes_per_weight) + dense) / PERIOD


class Sirius(Rule):
    """The rule `sirius`: its sparsity is the gate sparsity of CATS between corrections."""

    name = "sirius"
    title = "Sirius (CATS, corrected)"
    what = f"CATS generates, the dense model corrects every {PERIOD} tokens (Sirius)"

    def own_sparsity(self, shape, model_sparsity):
        return super().own_sparsity(shape, model_sparsity * PERIOD / (PERIOD - 1))

    def calibrate(self, model, batches, *, source=None, progress=True) -> Fit:
        return SiriusFit(self.name, calibrate(model, batches, source=source, progress=progress))


RULE = Sirius()

"""What is evaluated: a rule at a sparsity under a policy, and the text that it is calibrated on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cats import criteria
from cats.core.accounting import Accounting
from cats.core.thresholds import sparsities
from cats.criteria.masking import Policy
from cats.errors import CatsError

LEVELS = ("rule", "model")


@dataclass(frozen=True)
class Method:
    """A rule at a sparsity under a policy; the rule "dense" and rules that are not adjustable have sparsity
    None. `level`: "rule", the sparsity is the rule's own (for CATS of gate activations), or "model", it is
    the share of the blocks' linear weights that a token does without.
    """

    rule: str = criteria.DENSE
    sparsity: float | None = None
    policy: Policy = field(default_factory=Policy)
    level: str = "rule"

    def __post_init__(self):
        if self.level not in LEVELS:
            raise CatsError(f"The level {self.level!r} is unknown: a sparsity is of {' or '.join(LEVELS)}.")
        adjustable = self.rule != criteria.DENSE and criteria.rule(self.rule).adjustable
        if self.rule == criteria.DENSE:
            object.__setattr__(self, "policy", Policy())
        if self.sparsity is None:
            object.__setattr__(self, "level", "rule")
        if adjustable and self.sparsity is None:
            raise CatsError(f"{self.rule} needs a sparsity: in a plan `{self.rule}: 0.5`.")
        if adjustable:
            sparsities(self.sparsity, 1)
        elif self.sparsity is not None:
            raise CatsError(f"{self.rule} takes no sparsity: it has one of its own.")

    def __str__(self) -> str:
        if self.sparsity is None:
            return self.rule
        return f"{self.rule} {'model ' if self.level == 'model' else ''}{self.sparsity:g}"

    def rule_sparsity(self, shape: Accounting) -> float | None:
        """The sparsity to give the rule on a model of `shape`; CatsError where it cannot reach the target."""
        if self.sparsity is None or self.level == "rule":
            return self.sparsity
        return criteria.rule(self.rule).sparsity_for(shape, self.sparsity)


def methods(
    rules: Sequence[str], at: Sequence[float], policy: Policy | None = None, level: str = "rule"
) -> list[Method]:
    """Dense, then every rule at every sparsity (or once, where it takes none)."""
    policy = policy or Policy()
    result = [Method(policy=policy)]
    for name in rules:
        if name == criteria.DENSE:
            continue
        levels = at if criteria.rule(name).adjustable else [None]
        result += [Method(name, each, policy, level) for each in levels]
    return result

"""What is evaluated: a rule at a sparsity under a policy, and the text that it is calibrated on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cats import corpora, criteria
from cats.accounting import Accounting
from cats.errors import CatsError
from cats.masking import Policy
from cats.thresholds import sparsities

LEVELS = ("rule", "model")


@dataclass(frozen=True)
class Configuration:
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
        if adjustable:
            sparsities(self.sparsity, 1)
        elif self.sparsity is not None:
            raise CatsError(f"{self.rule} takes no sparsity: it has one of its own.")

    def __str__(self) -> str:
        if self.sparsity is None:
            return self.rule
        return f"{self.rule} {'model ' if self.level == 'model' else ''}{self.sparsity:g}"

    def own(self, shape: Accounting) -> float | None:
        """The rule's own sparsity on a model of `shape`; CatsError where the target is out of its reach."""
        if self.sparsity is None or self.level == "rule":
            return self.sparsity
        return criteria.rule(self.rule).own_sparsity(shape, self.sparsity)


@dataclass(frozen=True)
class Calibration:
    """Text that rules are calibrated on: as `cats.corpora.load` and `batches` take it."""

    corpus: str = corpora.DEFAULT
    split: str = "train"
    tokens: int = 60_000
    sequence_length: int = 512
    seed: int = 0


def configurations(
    rules: Sequence[str], at: Sequence[float], policy: Policy | None = None
) -> list[Configuration]:
    """Dense, then every rule at every sparsity (or once, where it takes none)."""
    policy = policy or Policy()
    result = [Configuration(policy=policy)]
    for name in rules:
        if name == criteria.DENSE:
            continue
        levels = at if criteria.rule(name).adjustable else [None]
        result += [Configuration(name, level, policy) for level in levels]
    return result

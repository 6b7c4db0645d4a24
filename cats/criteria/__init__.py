"""Rules by name, of one interface: a file of this package that registers a rule adds it everywhere."""

from importlib import import_module
from pkgutil import iter_modules

from cats.core.thresholds import Thresholds
from cats.criteria.rule import RULES, Fit, Rule, ThresholdFit, register
from cats.errors import CatsError, did_you_mean

DENSE = "dense"

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def rule(name: str) -> Rule:
    """The rule of that name; raises CatsError for an unknown one."""
    if name not in RULES:
        raise CatsError(
            f"Unknown rule {str(name)[:80]!r}{did_you_mean(name, RULES)}: "
            f"use {DENSE}, {', '.join(sorted(RULES))}."
        )
    return RULES[name]


def from_thresholds(thresholds: Thresholds) -> Fit:
    """The fit of the rule that a thresholds file is for."""
    return rule(thresholds.rule).from_thresholds(thresholds)


__all__ = ["DENSE", "RULES", "Fit", "Rule", "ThresholdFit", "from_thresholds", "register", "rule"]

"""Rules by name, of one interface: a file of this package that defines RULE is a rule."""

from importlib import import_module
from pkgutil import iter_modules

from cats.criteria.rule import Fit, Rule
from cats.errors import CatsError, did_you_mean

DENSE = "dense"


def _found() -> dict[str, Rule]:
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    rules = [module.RULE for module in modules if hasattr(module, "RULE")]
    return {rule.name: rule for rule in sorted(rules, key=lambda rule: (rule.name != "cats", rule.name))}


RULES = _found()


def rule(name: str) -> Rule:
    """The rule of that name; raises CatsError for an unknown one."""
    if name not in RULES:
        raise CatsError(f"Unknown rule {name!r}{did_you_mean(name, RULES)}: use {DENSE}, {', '.join(RULES)}.")
    return RULES[name]


__all__ = ["DENSE", "RULES", "Fit", "Rule", "rule"]

"""What is evaluated: a rule at a sparsity under a policy, and the text that it is calibrated on."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from cats import criteria
from cats.core.accounting import Accounting
from cats.core.thresholds import sparsities
from cats.corpora import corpus as corpora
from cats.corpora import sampled as sampling
from cats.corpora.readers import HUB, LOCAL
from cats.criteria.masking import Policy
from cats.errors import CatsError

LEVELS = ("rule", "model")
PADDING = ("excluded", "counted")


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
        return criteria.rule(self.rule).own_sparsity(shape, self.sparsity)


@dataclass(frozen=True)
class Calibration:
    """Text that rules are calibrated on: as `cats.corpora.load` and `batches` take it.

    `corpus`: one name, or several joined by "+", which give equal shares of the tokens; "sampled:500" is 500
    texts that the dense model writes.
    `rows` instead of `tokens`: so many rows. `padding` "counted": padding counts as text, as the reference
    code of the paper has it; how much there is depends on `batch_size` (None: 16 on a GPU, else 4).
    """

    corpus: str = corpora.DEFAULT
    split: str = "train"
    tokens: int = 60_000
    sequence_length: int = 512
    seed: int = 0
    rows: int | None = None
    padding: str = "excluded"
    batch_size: int | None = None

    def __post_init__(self):
        if self.padding not in PADDING:
            raise CatsError(f"padding={self.padding!r} is unknown: use one of {', '.join(PADDING)}.")
        for name in ("tokens", "sequence_length", "rows", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CatsError(f"{name}={value} is too small to calibrate on: use 1 or more.")

    def describe(self) -> dict:
        """The fields, later ones where they are set: what is measured keeps its name when fields are
        added.
        """
        later = {"rows": None, "padding": "excluded", "batch_size": None}
        return {key: value for key, value in asdict(self).items() if key not in later or value != later[key]}

    def check(self) -> None:
        """Raises CatsError for an unknown corpus or a missing file; a corpus by name is not read for it."""
        for name in self._names():
            if name.startswith(sampling.SAMPLED):
                sampling.number(name)
            elif name not in {*LOCAL, *HUB}:
                corpora.load(name, split=self.split)

    def _names(self) -> list[str]:
        is_file = Path(self.corpus).expanduser().is_file()  # whose path may have a "+" in it
        return [self.corpus] if is_file else self.corpus.split("+")

    def batches(
        self, tokenizer, device: str, sample: Callable[[int, int], Path] | None = None
    ) -> corpora.Batches:
        """The text, tokenised; errors as `cats.corpora.load` and `cats.corpora.batches`.

        `sample` writes so many texts of so many tokens by the model itself and returns their file.
        """
        names = self._names()
        parts = []
        for name in names:
            if name.startswith(sampling.SAMPLED):
                if sample is None:
                    raise CatsError(
                        f"{name} is text that a model writes, and there is none here: name a corpus."
                    )
                name = str(sample(sampling.number(name), self.sequence_length))
            part = corpora.batches(
                corpora.load(name, split=self.split),
                tokenizer,
                tokens=None if self.rows else self.tokens // len(names),
                rows=self.rows and self.rows // len(names),
                sequence_length=self.sequence_length,
                batch_size=self.batch_size or (16 if device == "cuda" else 4),
                seed=self.seed,
            )
            parts.append(part)
        result = corpora.mixed(parts)
        if self.padding == "counted":
            # text never sees what is on its right, so that only what is counted changes
            for batch in result:
                batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
            result.info["padding"] = "right, counted"
        return result


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

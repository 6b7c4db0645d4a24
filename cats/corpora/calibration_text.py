"""The text that rules are calibrated on, as a plan or a command names it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cats import paths
from cats.corpora.batches import Batches, batches, mixed
from cats.corpora.corpus import DEFAULT, load
from cats.corpora.readers import HUB, LOCAL
from cats.corpora.sampled import SAMPLED, number
from cats.errors import CatsError

PADDING = ("excluded", "counted")


@dataclass(frozen=True)
class Calibration:
    """Text that rules are calibrated on: as `cats.corpora.load` and `batches` take it.

    `corpus`: one name, or several joined by "+", which give equal shares of the tokens; "sampled:500" is 500
    texts that the dense model writes. `rows` instead of `tokens`: so many rows. `padding` "counted": padding
    counts as text, as the reference code of the paper has it; how much there is depends on `batch_size`
    (None: 16 on a GPU, else 4).
    """

    corpus: str = DEFAULT
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
        """The fields, later ones where they are set: what was measured before they came keeps its name."""
        later = {"rows": None, "padding": "excluded", "batch_size": None}
        return {key: value for key, value in asdict(self).items() if key not in later or value != later[key]}

    def check(self) -> None:
        """Raises CatsError for an unknown corpus or a missing file; a corpus by name is not read for it."""
        for name in self._names():
            if name.startswith(SAMPLED):
                number(name)
            elif name not in {*LOCAL, *HUB}:
                load(name, split=self.split)

    def _names(self) -> list[str]:
        is_file = paths.named(self.corpus).is_file()  # whose path may have a "+" in it
        return [self.corpus] if is_file else self.corpus.split("+")

    def batches(self, tokenizer, device: str, sample: Callable[[int, int], Path] | None = None) -> Batches:
        """The text, tokenised; errors as `cats.corpora.load` and `cats.corpora.batches`.

        `sample` writes so many texts of so many tokens by the model itself and returns their file.
        """
        names = self._names()
        parts = []
        for name in names:
            if name.startswith(SAMPLED):
                if sample is None:
                    raise CatsError(
                        f"{name} is text that a model writes, and there is none here: name a corpus."
                    )
                name = str(sample(number(name), self.sequence_length))
            part = batches(
                load(name, split=self.split),
                tokenizer,
                tokens=None if self.rows else self.tokens // len(names),
                rows=self.rows and self.rows // len(names),
                sequence_length=self.sequence_length,
                batch_size=self.batch_size or (16 if device == "cuda" else 4),
                seed=self.seed,
            )
            parts.append(part)
        result = mixed(parts)
        if self.padding == "counted":
            # text never sees what is on its right, so that only what is counted changes
            for batch in result:
                batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
            result.info["padding"] = "right, counted"
        return result

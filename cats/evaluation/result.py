"""What one model, under one rule and policy, scored on one task: metrics and every document's score,
compactly."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cats.core.thresholds import write_atomically
from cats.errors import CatsError
from cats.records.packing import pack, unpack

SCHEMA = 1


@dataclass
class Result:
    """One task under one method.

    `metrics`: means, and standard errors under "<metric>_se". `scores`: per metric an array with one number
    a document (for word perplexity two: log-probability and words), in the order of `documents`.
    `sparsity`: target, model_target and realised, by phase. `speed`: tokens, seconds, tokens_per_s.
    `texts`: what was generated, `asked`: the last question of each prompt; None where nothing was generated.
    """

    task: str
    documents: list[int]
    data: dict
    method: dict
    model: dict
    metrics: dict[str, float]
    scores: dict[str, np.ndarray]
    sparsity: dict
    speed: dict
    texts: list[str] | None = None
    asked: list[str] | None = None

    def save(self, path: Path) -> None:
        """Write the whole result under its name at once: no reader ever sees a part of it."""
        content = {"schema": SCHEMA, **asdict(self)}
        content["scores"] = {name: pack(values) for name, values in self.scores.items()}
        content["documents"] = {"count": len(self.documents), "chosen": None}
        if self.documents != list(range(len(self.documents))):
            content["documents"]["chosen"] = self.documents
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Raises CatsError for a file that is damaged or of another schema."""
        try:
            content = json.loads(path.read_text())
            if content.pop("schema") != SCHEMA:
                raise CatsError(f"The result {path.name} is of another schema: delete it to evaluate again.")
            if "configuration" in content:  # what files of earlier versions call the method
                content["method"] = content.pop("configuration")
            chosen = content["documents"]["chosen"]
            content["documents"] = chosen or list(range(content["documents"]["count"]))
            content["scores"] = {name: unpack(packed) for name, packed in content["scores"].items()}
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CatsError(f"The result {path} is damaged: delete it to evaluate again.") from error


def summarise(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Metrics and their standard errors: means of a score a document, perplexities from sums of
    log-probabilities.
    """
    metrics: dict[str, float] = {}
    for name, values in scores.items():
        if values.ndim == 2:
            metrics |= _ratio(name, values[:, 0], values[:, 1])
        elif name == "perplexity":
            value = math.exp(-values.mean())
            metrics |= {name: value, f"{name}_se": value * _standard_error(values)}
        else:
            metrics |= {name: float(values.mean()), f"{name}_se": _standard_error(values)}
    return metrics


def _ratio(name: str, logs: np.ndarray, units: np.ndarray) -> dict[str, float]:
    """exp(-Σ log-probability / Σ units), or that in bits, with a standard error over documents (delta
    method).
    """
    rate = -logs.sum() / units.sum()
    spread = _standard_error(-logs - rate * units) / units.mean()
    if name == "bits_per_byte":
        return {name: rate / math.log(2), f"{name}_se": spread / math.log(2)}
    if name == "nll":
        both = {"nll_nats": rate, "nll_nats_se": spread, "perplexity": math.exp(rate)}
        return {**both, "perplexity_se": math.exp(rate) * spread}
    return {name: math.exp(rate), f"{name}_se": math.exp(rate) * spread}


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

"""What one model scored by one method on one task: metrics, and every document's score in little space."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from cats.errors import CatsError
from cats.paths import write_atomically
from cats.records.origin import Origin
from cats.records.packing import pack, unpack

SCHEMA = 1


class Sparsity(TypedDict, total=False):
    """What a method was to leave out and what it left out, over all tokens that the model read."""

    gate_target: float  # share of gate activations, what the rule was asked for
    model_target: float  # share of the blocks' linear weights
    bytes_per_token: float  # 16-bit weights, from the target
    gate_realised: float | None  # None where a rule drops other weights than rows of W_up and W_down
    model_realised: float
    bytes_realised: float  # a token: 16-bit weights of the model without those that were left out
    realised: dict[str, dict]  # by phase, as `cats.criteria.masking.Masking.realised`
    corrected_tokens: int  # where the dense model corrects a sparse one: answers' tokens, and steps of each
    corrected_sparse_steps: int
    corrected_dense_steps: int


class Speed(TypedDict):
    """Of the scoring alone, calibration and encoding excluded."""

    tokens: int  # read and generated, padding excluded
    seconds: float
    tokens_per_s: float


class MethodNote(TypedDict, total=False):
    """What tells one evaluation from another, and how it went."""

    model: list  # id, revision, sha256, dtype, seed
    rule: str
    sparsity: float | None
    level: str  # of the sparsity, where it is not the rule's own
    policy: dict | None
    calibration: dict | None
    documents: int | None  # asked for; None: all
    seed: int | None
    chat: bool
    text_tokens: int | None
    shots: int
    processes: int
    calibrated: dict | None  # what the calibrated rule says about itself


@dataclass
class Result:
    """One method on one task."""

    task: str
    documents: list[int]  # numbers in the evaluated split
    data: dict  # what a record says about the documents
    method: MethodNote
    model: dict
    metrics: dict[str, float]  # means, and their standard errors under "<metric>_se"
    scores: dict[str, np.ndarray]  # for each metric, in the order of `documents`: see task.Answers
    sparsity: Sparsity
    speed: Speed
    texts: list[str] | None = None  # what was generated
    asked: list[str] | None = None  # the last question of each prompt
    origin: Origin | None = None  # of the run that scored it; None in files of earlier versions

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

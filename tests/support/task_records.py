"""Records of the evaluation's experiments, measured on toy models, under the names that chapters ask for."""

from pathlib import Path

import numpy as np
from evaluation_toys import loaded, mirrors

from cats.corpora import Calibration
from cats.criteria.masking import Policy
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.intervals import summarise
from cats.evaluation.method import methods
from cats.evaluation.result import Result
from cats.evaluation.table import load_results, write_records

MATHS, MATHS_APART = "toy-gsm8k", "toy-gsm8k-decode-only"
TRANSFER = "transfer-from-"
TEXTS = ("cats.txt", "dogs.txt")
PROBLEMS = 8


def write(folder: Path, scratch: Path) -> None:
    """Records of gsm8k with the prompt masked and not, and of two calibrations on texts and tasks."""
    data = mirrors(scratch / "mirrors", PROBLEMS)
    texts = _texts(scratch)
    for slug, policy, levels in (
        (MATHS, Policy(), [0.5, 0.7]),
        (MATHS_APART, Policy(prefill="dense"), [0.5]),
    ):
        wanted = methods(["cats"], levels, policy)
        found = _run(scratch / "runs", data, ["gsm8k"], wanted, texts[0])
        _solve(found, 4 if policy == Policy() else 5)
        write_records(found, slug, parameters={}, folder=folder)
    for name, text in zip(TEXTS, texts, strict=True):
        wanted = methods(["cats", "online"], [0.5])
        tasks = [f"text:{other}" for other in texts] + ["piqa", "lambada_openai"]
        found = _run(scratch / "runs", data, tasks, wanted, text)
        write_records(found, TRANSFER + name, parameters={}, folder=folder)


def _texts(folder: Path) -> list[str]:
    """Paths of two texts of a few documents."""
    paths = []
    for name, word in zip(TEXTS, ("cat", "dog"), strict=True):
        lines = [
            f"{number}: the {word} saw {number * 7} birds over it, again and again." for number in range(12)
        ]
        (folder / name).write_text("\n\n\n".join(lines))
        paths.append(str(folder / name))
    return paths


def _run(output: Path, data: Path, names, wanted, corpus: str) -> list[Result]:
    evaluator = Evaluator(
        loaded(num_hidden_layers=1),
        output,
        data_dir=str(data),
        documents=PROBLEMS,
        text_tokens=24,
        calibration=Calibration(corpus, split="all", tokens=256, sequence_length=64),
    )
    return load_results(evaluator.run(names, wanted, progress=False))


def _solve(found: list[Result], at_half: int) -> None:
    """A toy solves nothing: say that dense solves six of eight, 50 % `at_half`, 70 % three."""
    counts = {None: 6, 0.5: at_half, 0.7: 3}
    for each in found:
        right = np.arange(PROBLEMS) < counts[each.method["sparsity"]]
        each.scores["exact_match"] = right.astype(float)
        each.metrics |= summarise({"exact_match": each.scores["exact_match"]})

"""A task without a download: which of four sentences continues a passage of Python's documentation."""

import hashlib
import json
import random
import re
from itertools import pairwise

import datasets

from cats import corpora
from cats.evaluation.task_list import DOCS_CLOZE

CONFIG = {
    "task": DOCS_CLOZE,
    "dataset_path": "pydoc_data.topics of the standard library",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{context}}",
    "doc_to_target": "label",
    "doc_to_choice": "endings",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
    "metadata": {"version": 1.0},
}
_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_CONTEXT, _ENDING = (50, 250), (40, 160)  # characters, from and to
_CHOICES = 4


def splits() -> tuple[datasets.DatasetDict, dict[str, str]]:
    """The split "test" with columns context, endings (four) and label, and the sha256 of its rows.

    A context is a sentence of the corpus' test split, the right ending the next one of its paragraph; the
    wrong ones are right endings elsewhere, drawn with a fixed seed.
    """
    pairs = []
    for document in corpora.load("python-docs", split="test").documents:
        for paragraph in re.split(r"\n\s*\n", document):
            sentences = _BREAK.split(" ".join(paragraph.split()))
            for context, ending in pairwise(sentences):
                if _CONTEXT[0] <= len(context) <= _CONTEXT[1] and _ENDING[0] <= len(ending) <= _ENDING[1]:
                    pairs.append((context, ending))
    generator = random.Random(0)
    rows = []
    for number, (context, ending) in enumerate(pairs):
        others = generator.sample([item[1] for item in pairs[:number] + pairs[number + 1 :]], _CHOICES - 1)
        label = generator.randrange(_CHOICES)
        rows.append(
            {"context": context, "endings": [*others[:label], ending, *others[label:]], "label": label}
        )
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}), {"test": digest}

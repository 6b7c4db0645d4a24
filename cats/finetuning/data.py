"""Rows to train on and to hold out: packed text, or instructions with the loss on the response alone."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from string import Formatter

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cats import corpora, paths
from cats.corpora.readers import read_rows
from cats.errors import CatsError

TASK = "task:"
# The reference code's form of its tasks; the answers are the two words whose logits it compares.
TEMPLATE = "[INST] {instruction} {text} [/INST] ### Response: "
_TASKS = {
    "sst2": ("Is the sentiment of this sentence positive?", "{sentence}", "label"),
    "boolq": ("Answer the question from the passage.", "{passage} {question}?", "label"),
    "cola": ("Is this sentence grammatical?", "{sentence}", "label"),
    "piqa": ("Is the second way the better one?", "{goal} First: {sol1} Second: {sol2}", "label"),
}
ANSWERS = ("no", "yes")
FEWEST = 60  # rows held out, where as many are asked for: fewer cannot tell methods apart
_PIECES = 64
_IGNORED = -100  # a label that no loss counts


class Rows(Dataset):
    """Rows of token ids, each with the number of its first tokens that are no target."""

    def __init__(self, rows: list[tuple[list[int], int]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[list[int], int]:
        return self.rows[number]


@dataclass
class TrainingText:
    """What a run reads: `train` rows in the order of the steps, `indomain` rows of documents never trained
    on, `heldout` rows of another source; `answers` are the ids of the words that a task chooses between.

    `info`: name, split, counts and sha256 of both sources, tokens trained on and passes over the text.
    """

    train: Rows
    indomain: Rows
    heldout: Rows
    info: dict
    answers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """One instruction and its response."""

    prompt: str
    response: str


def is_instructions(name: str) -> bool:
    """Whether a name asks for instructions: a task, or a .jsonl file called …instructions…"""
    return name.startswith(TASK) or "instructions" in Path(name).name


def load(
    name: str,
    heldout: str,
    tokenizer,
    *,
    rows: int,
    sequence_length: int,
    seed: int = 0,
    heldout_rows: int = 64,
    heldout_split: str = "test",
    documents: int | None = None,
    data_dir: str | None = None,
) -> TrainingText:
    """`rows` rows of `name` to train on and at most `heldout_rows` each to measure on.

    Names: a corpus of `cats.corpora`, or instructions: "task:sst2", "task:boolq", "task:cola", "task:piqa"
    from mirrors in `data_dir`, or a .jsonl file with "instructions" in its name and the fields `prompt` and
    `response`. `heldout_split`: of a corpus by name, "all" where nothing else is read from it. Rows depend on
    `seed` alone, not on how many are taken: a longer run begins as a shorter one. Raises CatsError for
    unknown names, mixed forms, too little text, and a held-out text that is the training text.
    """
    instructions = is_instructions(name)
    if instructions != is_instructions(heldout):
        raise CatsError(f"{name} and {heldout} are not of one form: both text, or both instructions.")
    if instructions:
        units, about = examples(name, "train", data_dir)
        measured, about_heldout = examples(heldout, "validation", data_dir)
    else:
        units, about = _documents(name, "train", documents)
        units = _pieces(units) if len(units) < _PIECES // 4 else units
        measured, about_heldout = _documents(heldout, heldout_split, None)
    if about["sha256"] == about_heldout["sha256"]:
        raise CatsError(f"{heldout} is the training text itself: hold out another one.")

    def encoded(order: Iterable) -> Iterator[tuple[list[int], int]]:
        if instructions:
            return (_row(example, tokenizer, sequence_length) for example in order)
        prefix = corpora.bos_ids(tokenizer, "auto")
        ids = (corpora.encode(tokenizer, text) for text in order)
        packed = corpora.rows_packed(ids, sequence_length - len(prefix), tokenizer.eos_token_id)
        return ((prefix + row, len(prefix)) for row in packed)

    units = random.Random(0).sample(units, len(units))  # what is kept out is the same for every seed
    rest = iter(units)
    indomain = list(islice(encoded(islice(rest, len(units) // 4)), heldout_rows))
    if not indomain:
        raise CatsError(f"{name} is too short to keep a row of {sequence_length} tokens out of training.")
    train, passes = _stream(list(rest), encoded, rows, seed, name)  # documents that were not looked at
    measured_rows = list(islice(encoded(random.Random(0).sample(measured, len(measured))), heldout_rows))
    if not measured_rows:
        raise CatsError(f"{heldout} is shorter than one row of {sequence_length} tokens: use a shorter row.")
    if len(measured_rows) < min(heldout_rows, FEWEST):
        raise CatsError(
            f"{heldout} has {len(measured_rows)} rows of {sequence_length} tokens where {heldout_rows} are "
            "asked for: hold out a longer text, or use shorter rows."
        )
    info = {
        "train": about,
        "heldout": about_heldout,
        "sequence_length": sequence_length,
        "train_rows": len(train),
        "train_tokens": sum(len(ids) for ids, _ in train),
        "train_sha256": _digest(train),
        "passes_begun": passes,
        "indomain_rows": len(indomain),
        "heldout_rows": len(measured_rows),
        "heldout_sha256": _digest(measured_rows),
        "loss": "response only" if instructions else "every token of packed text",
        "order_seed": seed,
    }
    answers = _answers(units, tokenizer) if instructions else []
    return TrainingText(Rows(train), Rows(indomain), Rows(measured_rows), info, answers)


def collate(rows: list[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask", "labels"}, each [B, T], padded on the right to the longest row."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for row, (tokens, skipped) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, skipped : len(tokens)] = ids[row, skipped : len(tokens)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _stream(units: list, encoded, rows: int, seed: int, name: str) -> tuple[list, int]:
    """The first `rows` rows of passes over the units, each in an order of its own, and the passes begun."""
    taken: list = []
    passes = 0
    while len(taken) < rows:
        order = random.Random(f"{seed}:{passes}").sample(units, len(units))
        found = list(islice(encoded(order), rows - len(taken)))
        if not found:
            raise CatsError(f"{name} has no row of the length asked: use a longer text or a shorter row.")
        taken += found
        passes += 1
    return taken, passes


def _documents(name: str, split: str, documents: int | None) -> tuple[list[str], dict]:
    split = "all" if Path(name).suffix else split  # a file is one part: what is held out is another file
    corpus = corpora.load(name, split=split, documents=documents)
    return corpus.documents, corpus.info


def _pieces(documents: list[str]) -> list[str]:
    """A few long documents, a book say, as about `_PIECES` shorter ones: some must be kept out."""
    length = -(-sum(map(len, documents)) // _PIECES)
    return [text[i : i + length] for text in documents for i in range(0, len(text), length)]


def examples(name: str, split: str, data_dir: str | None) -> tuple[list[Example], dict]:
    """The instructions of a task's split, or of a .jsonl file, and what a record says of them.

    Raises CatsError for an unknown task, a missing mirror or split, and rows that lack one of the two.
    """
    if name.startswith(TASK):
        return _task(name.removeprefix(TASK), split, data_dir)
    path = paths.named(name)
    rows, extra = read_rows(path, "prompt", "response")
    found = [Example(*row) for row in rows]
    for number, row in enumerate(found, 1):
        if not (row.prompt and row.response):
            raise CatsError(f"Row {number} of {path.name} lacks a prompt or a response: give both in each.")
    return found, _about(extra.pop("name"), "all", found, extra)


def _task(task: str, split: str, data_dir: str | None) -> tuple[list[Example], dict]:
    from cats.evaluation.mirrors import mirror, read_splits

    if task not in _TASKS:
        raise CatsError(f"There is no form for the task {task!r}: use one of {', '.join(_TASKS)}.")
    folder = mirror(task, data_dir)
    if folder is None:
        raise CatsError(f"There is no mirror of {task}: name its folder with --data-dir or CATS_EVAL_DATA.")
    splits, digests = read_splits(folder)
    cut = set(splits) == {"validation"}  # a mirror without a train split gives up three quarters of it
    if split not in splits and not cut:
        raise CatsError(f"The mirror of {task} has no {split} split (it has {', '.join(splits)}).")
    instruction, text, label = _TASKS[task]
    rows = splits["validation" if cut else split].to_list()
    if cut:
        wanted = "test" if split == "validation" else "train"
        shared = next(field for _, field, *_ in Formatter().parse(text))  # what several questions are about
        rows = [row for row in rows if corpora.part_of(row[shared]) == wanted]
        split = f"validation, its {wanted} part"
    found = [
        Example(TEMPLATE.format(instruction=instruction, text=text.format(**row)), ANSWERS[int(row[label])])
        for row in rows
    ]
    return found, _about(task, split, found, {"files": digests})


def _about(name: str, split: str, examples: list[Example], extra: dict) -> dict:
    text = "\0".join(part for example in examples for part in (example.prompt, example.response))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {
        "name": name,
        "split": split,
        "documents": len(examples),
        "characters": len(text),
        "sha256": digest,
        **extra,
    }


def _row(example: Example, tokenizer, length: int) -> tuple[list[int], int]:
    """Prompt and response as tokens, the beginning of the prompt cut where both do not fit."""
    prefix = corpora.bos_ids(tokenizer, "auto")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    response = [*corpora.encode(tokenizer, example.response), *end]
    room = length - len(prefix) - len(response)
    if room < 1:
        raise CatsError(
            f"A response of {len(response)} tokens does not fit rows of {length}: use longer rows."
        )
    prompt = [*prefix, *corpora.encode(tokenizer, example.prompt)[-room:]]
    return [*prompt, *response], len(prompt)


def _answers(examples: list[Example], tokenizer) -> list[int]:
    """First tokens of the responses, where these are a choice between a few."""
    responses = sorted({example.response for example in examples[:1000]})
    first = [corpora.encode(tokenizer, response)[0] for response in responses[:11]]
    return first if 2 <= len(responses) <= 10 and len(set(first)) == len(first) else []


def _digest(rows: list[tuple[list[int], int]]) -> str:
    digest = hashlib.sha256()
    for ids, skipped in rows:
        digest.update(f"{skipped}:{ids}".encode())
    return digest.hexdigest()

"""Perplexity on plain text as a task, "text:<corpus>", so that an evaluator measures it beside the others."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from cats.corpora import corpus as corpora
from cats.corpora.readers import HUB, LOCAL
from cats.criteria.masking import Masking
from cats.evaluation.distributed import Processes
from cats.evaluation.perplexity import document_nll

PREFIX = "text:"
_LENGTH = 1024  # tokens of context at most


@dataclass
class LoadedText:
    """A corpus as a task: `documents` are numbers of those with a token to score, known after the first
    run.
    """

    name: str
    corpus: corpora.Corpus
    documents: list[int]
    data: dict
    shots: int = 0
    encoded: dict[int, list[int]] = field(default_factory=dict)  # kept for the next method


def is_text(name: str) -> bool:
    """Whether a task's name asks for the perplexity of a corpus."""
    return name.startswith(PREFIX)


def check(name: str) -> None:
    """Raises CatsError for an unknown corpus or a missing file; a corpus by name is not read for it."""
    if name.removeprefix(PREFIX) not in {*LOCAL, *HUB}:
        load(name, documents=None, seed=0)


def load(name: str, *, documents: int | None, seed: int) -> LoadedText:
    """The test split (of a hub data set: validation) of a corpus, at most `documents` of it; errors as
    `cats.corpora.load`.
    """
    title = name.removeprefix(PREFIX)
    split = "all" if title.endswith((".txt", ".jsonl", ".gz")) else "test"
    corpus = corpora.load(title, split=split, documents=documents if title in HUB else None, seed=seed)
    if documents is not None and documents < len(corpus.documents):
        corpus = corpora.load(title, split=split, documents=documents, seed=seed)
    return LoadedText(f"{PREFIX}{corpus.name}", corpus, list(range(len(corpus.documents))), corpus.info)


def score(
    task: LoadedText, lm, processes: Processes, tokens: int | None = None
) -> tuple[dict[str, np.ndarray], None]:
    """{"nll": [documents, 2]}, log-probability and tokens of each document, 0 and 0 for one too short to
    score; `tokens` keeps the beginning of longer ones.
    """
    mine = processes.share(task.documents)
    for number in mine:
        if number not in task.encoded:
            task.encoded[number] = corpora.encode(lm.tokenizer, task.corpus.documents[number])
    found: dict[int, tuple] = {}
    if mine:
        hook = lm.model.register_forward_pre_hook(partial(announce, lm.masking), with_kwargs=True)
        try:
            table = document_nll(
                lm.model,
                lm.tokenizer,
                [task.encoded[number] for number in mine],
                max_length=min(_LENGTH, lm.max_length),
                tokens_per_document=tokens,
            )
        finally:
            hook.remove()
        found = {mine[row.document]: (-row.nll_nats, row.tokens) for row in table.itertuples()}
        lm.processed += int(table.tokens.sum())
    everything = {key: value for part in processes.gather(found) for key, value in part.items()}
    return {"nll": np.asarray([everything.get(n, (0.0, 0)) for n in task.documents], dtype=float)}, None


def announce(masking: Masking, module, args: tuple, kwargs: dict) -> None:
    """A forward pre-hook that tells `masking` of a call that reads text."""
    masking.begin("prefill", kwargs["attention_mask"].bool())

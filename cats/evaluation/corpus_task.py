"""Perplexity on plain text as a task, "text:<corpus>", so that an evaluator measures it beside the others."""

from dataclasses import dataclass, field

import numpy as np

from cats import corpora
from cats.corpora.readers import HUB, LOCAL
from cats.evaluation.distributed import Processes
from cats.evaluation.perplexity import document_nll
from cats.evaluation.task import Answers

PREFIX = "text:"
_LENGTH = 1024  # tokens of context at most


@dataclass
class CorpusTask:
    """A corpus as a `cats.evaluation.task.Task`; `tokens` keeps the beginning of longer documents."""

    name: str
    corpus: corpora.Corpus
    documents: list[int]
    data: dict
    tokens: int | None = None
    shots: int = 0
    encoded: dict[int, list[int]] = field(default_factory=dict)  # kept for the next method

    def prepare(self, lm, processes: Processes) -> None:
        """Encode this process' share of the documents."""
        for number in processes.share(self.documents):
            if number not in self.encoded:
                self.encoded[number] = corpora.encode(lm.tokenizer, self.corpus.documents[number])

    def score(self, lm, processes: Processes) -> Answers:
        """{"nll": [documents, 2]}, log-probability and tokens of each document, 0 and 0 for one that is too
        short to score."""
        self.prepare(lm, processes)
        mine = processes.share(self.documents)
        scored: dict[int, tuple] = {}
        if mine:
            with lm.masking.announcing():
                sums = document_nll(
                    lm.model,
                    lm.tokenizer,
                    [self.encoded[number] for number in mine],
                    max_length=min(_LENGTH, lm.max_length),
                    tokens_per_document=self.tokens,
                )
            scored = {mine[row.document]: (-row.nll_nats, row.tokens) for row in sums.itertuples()}
            lm.processed += int(sums.tokens.sum())
        everything = {key: value for part in processes.gather(scored) for key, value in part.items()}
        nll = [everything.get(number, (0.0, 0)) for number in self.documents]
        return Answers({"nll": np.asarray(nll, dtype=float)})


def is_text(name: str) -> bool:
    """Whether a task's name asks for the perplexity of a corpus."""
    return name.startswith(PREFIX)


def check(name: str) -> None:
    """Raise CatsError for an unknown corpus or a missing file; a corpus by name is not read for it."""
    if name.removeprefix(PREFIX) not in {*LOCAL, *HUB}:
        load(name, documents=None, seed=0)


def load(name: str, *, documents: int | None, seed: int, tokens: int | None = None) -> CorpusTask:
    """The test split (of a hub data set: validation) of a corpus, at most `documents` of it; errors as
    `cats.corpora.load`."""
    title = name.removeprefix(PREFIX)
    split = "all" if title.endswith((".txt", ".jsonl", ".gz")) else "test"
    corpus = corpora.load(title, split=split, documents=documents if title in HUB else None, seed=seed)
    if documents is not None and documents < len(corpus.documents):
        corpus = corpora.load(title, split=split, documents=documents, seed=seed)
    numbers = list(range(len(corpus.documents)))
    return CorpusTask(f"{PREFIX}{corpus.name}", corpus, numbers, corpus.info, tokens)

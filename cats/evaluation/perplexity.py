"""Perplexity by sums over documents, so that sparse and dense are compared document by document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm.auto import tqdm

from cats.corpora.batches import bos_ids, encode
from cats.errors import CatsError

_BATCH_TOKENS = 2048  # logits [2048, 152k] fp32 are 1.2 GB; larger batches are no faster on two cores


@dataclass
class _Window:
    """A row of token ids of one document; the last `scored` of them are targets."""

    document: int
    ids: list[int]
    scored: int


@torch.inference_mode()
def document_nll(
    model,
    tokenizer,
    documents: Sequence[str] | Sequence[list[int]],
    *,
    max_length: int = 1024,
    stride: int | None = None,
    tokens_per_document: int | None = None,
    bos: str = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Summed negative log-likelihood of each document: columns document, tokens (scored), nll_nats (the sum).

    `documents`: texts, or their token ids as `cats.corpora.encode` has them.
    A document longer than `max_length` is read in windows of `max_length` that advance by `stride` (default:
    no more overlap than the one token of context that the first target needs). Every token is scored exactly
    once; the first of a document only where the BOS policy (`cats.corpora.bos_ids`) puts a token before it.
    So `stride` changes the context, never the token count. `tokens_per_document` keeps the beginning of
    longer documents.
    Raises CatsError where no document has a token to score, or the window does not fit the model.
    """
    prefix = bos_ids(tokenizer, bos)
    _check_window(model, max_length, stride)
    windows: list[_Window] = []
    for number, text in enumerate(documents):
        ids = (encode(tokenizer, text) if isinstance(text, str) else text)[:tokens_per_document]
        windows += _windows(number, ids, prefix, max_length, stride or max_length)
    if not windows:
        raise CatsError("No document has a token to score: give longer documents or bos='always'.")
    sums = np.zeros(len(documents))
    counts = np.zeros(len(documents), dtype=np.int64)
    total = sum(window.scored for window in windows)
    with tqdm(total=total, desc="perplexity", unit="tok", disable=None if progress else True) as bar:
        for batch in _by_length(windows):
            for window, nll in zip(batch, _score(model, batch), strict=True):
                sums[window.document] += nll
                counts[window.document] += window.scored
                bar.update(window.scored)
    table = pd.DataFrame({"document": range(len(documents)), "tokens": counts, "nll_nats": sums})
    return table[table.tokens > 0].reset_index(drop=True)


def perplexity(scores: pd.DataFrame) -> dict:
    """Totals of `document_nll`: documents, tokens, nll_nats (mean per token) and perplexity, exp(nll_nats).

    What the paper's rebuttal prints as "perplexity" is nll_nats: its code logs the loss under that name.
    """
    tokens = int(scores.tokens.sum())
    nll = float(scores.nll_nats.sum() / tokens)
    return {"documents": len(scores), "tokens": tokens, "nll_nats": nll, "perplexity": float(np.exp(nll))}


def _check_window(model, max_length: int, stride: int | None) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length < 2 or (limit and max_length > limit):
        raise CatsError(f"max_length={max_length} is outside 2 … {limit}, what the model can read at once.")
    if stride is not None and not 1 <= stride <= max_length:
        raise CatsError(f"stride={stride} is outside 1 … max_length={max_length}.")


def _windows(document: int, ids: list[int], prefix: list[int], max_length: int, stride: int) -> list[_Window]:
    """Cut one document; each window is the prefix, tokens of context, and `scored` new tokens."""
    room = max_length - len(prefix)
    if room < (1 if prefix else 2):
        raise CatsError(f"max_length={max_length} leaves no room for text behind the first token: use more.")
    context = max(room - stride, 0 if prefix else 1)
    windows = []
    done = 0 if prefix else 1  # without a prefix the first token has nothing to be predicted from
    while done < len(ids):
        start = max(0, done - context) if windows else 0
        stop = min(len(ids), start + room)
        windows.append(_Window(document, prefix + ids[start:stop], stop - done))
        done = stop
    return windows


def _by_length(windows: list[_Window]) -> list[list[_Window]]:
    """Batches of similar length, longest first, of at most _BATCH_TOKENS with padding."""
    batches: list[list[_Window]] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if batches and len(batches[-1][0].ids) * (len(batches[-1]) + 1) <= _BATCH_TOKENS:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


def _score(model, batch: list[_Window]) -> list[float]:
    """Summed NLL in nats of each window's targets, from logits [B, T, V] raised to fp32."""
    width = len(batch[0].ids)
    input_ids = torch.zeros((len(batch), width), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, window in enumerate(batch):
        input_ids[row, : len(window.ids)] = torch.tensor(window.ids)
        attention_mask[row, : len(window.ids)] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    sums = []
    for row, window in enumerate(batch):
        stop = len(window.ids)
        start = stop - window.scored
        targets = input_ids[row, start:stop]
        predictions = logits[row, start - 1 : stop - 1].float()
        sums.append(functional.cross_entropy(predictions, targets, reduction="sum"))
    return torch.stack(sums).double().tolist()

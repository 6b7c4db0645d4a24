"""Documents cut into batches of token ids."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch

from cats.corpora.corpus import Corpus
from cats.errors import CatsError


class Batches(list):
    """Batches of {"input_ids": [B, T] int64, "attention_mask": [B, T] int64}, and where they come from.

    `info`: the provenance of the corpus with tokens (padding excluded), rows, sequence_length, bos and
    padding policy, and seed.
    """

    info: dict


def batches(
    corpus: Corpus,
    tokenizer,
    *,
    tokens: int | None = None,
    rows: int | None = None,
    sequence_length: int = 512,
    batch_size: int = 4,
    bos: str = "auto",
    seed: int | None = 0,
    pad: bool = True,
) -> Batches:
    """Tokenise documents in a seeded order (`seed` None: as they come) until exactly `tokens` are taken.

    `pad` True cuts each document into rows of at most `sequence_length` tokens, overflow rows included, and
    pads on the right to the longest row of a batch (the paper's way). False joins the documents, an
    end-of-sequence token between them, and cuts rows of `sequence_length`. `tokens` None takes all; `bos` is
    explained at `bos_ids`. `rows` instead of `tokens` takes that many rows, drawn from the whole corpus.
    Raises CatsError where the corpus is shorter than `tokens` or `rows`, and for a number below 1.
    """
    for name, number in (("tokens", tokens), ("rows", rows), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise CatsError(f"{name}={number} is no text: use at least 1.")
    prefix = bos_ids(tokenizer, bos)
    if sequence_length <= len(prefix):
        raise CatsError(f"sequence_length={sequence_length} leaves no room for text: use at least 2.")
    order = list(range(len(corpus.documents)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    encoded = (encode(tokenizer, corpus.documents[i]) for i in order)
    room = sequence_length - len(prefix)
    cut = _rows_by_document(encoded, room) if pad else rows_packed(encoded, room, tokenizer.eos_token_id)
    if rows is not None:
        cut = _draw(list(cut), rows, seed or 0, corpus)
    taken_rows: list[list[int]] = []
    taken = 0
    for row in cut:
        row = prefix + row
        if tokens is not None:
            row = row[: tokens - taken]
        taken_rows.append(row)
        taken += len(row)
        if taken == tokens:
            break
    if tokens is not None and taken < tokens:
        raise CatsError(
            f"The corpus {corpus.name} ({corpus.split}) has {taken:,} tokens, fewer than the {tokens:,} "
            "asked: ask for fewer or use a longer corpus."
        )
    starts = range(0, len(taken_rows), batch_size)
    result = Batches(_pad(taken_rows[i : i + batch_size], tokenizer) for i in starts)
    result.info = {
        **corpus.info,
        "tokens": taken,
        "rows": len(taken_rows),
        "sequence_length": sequence_length,
        "bos": f"{bos}: {'none' if not prefix else tokenizer.decode(prefix)}",
        "padding": "right, excluded" if pad else "none, packed",
        "order_seed": seed,
    }
    return result


def mixed(parts: Sequence[Batches]) -> Batches:
    """Batches of several corpora in turn.

    `info` is that of the first with names, licences and counts of all, and a hash of their hashes.
    """
    if len(parts) == 1:
        return parts[0]
    result = Batches(batch for turn in zip_longest(*parts) for batch in turn if batch is not None)
    infos = [part.info for part in parts]
    hashes = "\0".join(info["sha256"] for info in infos)
    result.info = {
        **infos[0],
        "name": " + ".join(info["name"] for info in infos),
        "licence": ", ".join(dict.fromkeys(info["licence"] for info in infos)),
        "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        **{
            count: sum(info[count] for info in infos)
            for count in ("documents", "characters", "tokens", "rows")
        },
    }
    return result


def bos_ids(tokenizer, bos: str) -> list[int]:
    """The token ids that start a row: "auto" as the tokenizer itself does, "always", or "never"."""
    if bos == "auto":
        bare = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a").input_ids
        return full[: full.index(bare[0])] if bare else []
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise CatsError(
                "bos='always' was asked for but this tokenizer has no BOS token: use 'auto' or 'never'."
            )
        return [tokenizer.bos_token_id]
    if bos == "never":
        return []
    raise CatsError(f"Unknown BOS policy {bos!r}: use 'auto', 'always' or 'never'.")


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text without special tokens, whatever its length."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _draw(cut: list[list[int]], rows: int, seed: int, corpus: Corpus) -> list[list[int]]:
    if len(cut) < rows:
        raise CatsError(
            f"The corpus {corpus.name} ({corpus.split}) has {len(cut):,} rows of this length, fewer than the "
            f"{rows:,} asked: ask for fewer or use a longer corpus."
        )
    return random.Random(seed).sample(cut, rows)


def _rows_by_document(encoded, room: int) -> Iterator[list[int]]:
    for ids in encoded:
        for start in range(0, len(ids), room):
            yield ids[start : start + room]


def rows_packed(encoded, room: int, separator: int | None) -> Iterator[list[int]]:
    """Rows of exactly `room` tokens; what is left at the end of the corpus is dropped."""
    pending: list[int] = []
    for ids in encoded:
        pending += ids if separator is None else [*ids, separator]
        while len(pending) >= room:
            yield pending[:room]
            pending = pending[room:]


def _pad(rows: list[list[int]], tokenizer) -> dict:
    width = max(map(len, rows))
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    input_ids = torch.full((len(rows), width), filler, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}

"""How far a sparse model's greedy text goes along with the dense model's, token by token."""

from collections.abc import Sequence

import pandas as pd
import torch

from cats.continuation import continue_prompts
from cats.corpora import encode
from cats.errors import CatsError
from cats.masking import Masking, Policy

_PREFILL_TOKENS = 2048


def beginnings(tokenizer, documents: Sequence[str], tokens: int) -> list[list[int]]:
    """The first `tokens` token ids of each document that has more; raises CatsError where none has."""
    prompts = [ids[:tokens] for text in documents if len(ids := encode(tokenizer, text)) > tokens]
    if not prompts:
        raise CatsError(f"No document has more than {tokens} tokens: ask for shorter prompts.")
    return prompts


def continuations(model, tokenizer, prompts, *, new_tokens: int, policy: Policy | None = None):
    """Token ids that the model adds to each prompt, greedily, and the sparsity realised by phase.

    A sparse model masks under `policy`; the end of a text ends a row only by an end-of-sequence token.
    """
    with Masking(model, policy) as masking:
        added = continue_prompts(
            model,
            prompts,
            new_tokens=new_tokens,
            eos=[tokenizer.eos_token_id],
            ended=lambda ids: None,
            masking=masking,
            prefill_tokens=_PREFILL_TOKENS,
        )
        return added, masking.realised()


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the start of both that are equal."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def curve(dense: Sequence[Sequence[int]], sparse: Sequence[Sequence[int]], label: str) -> pd.DataFrame:
    """Share of prompts whose texts agree up to each token: label, token, share, and the mean `length`."""
    lengths = torch.tensor([common(a, b) for a, b in zip(dense, sparse, strict=True)])
    longest = max(len(ids) for ids in dense)
    places = range(1, longest + 1)
    return pd.DataFrame(
        {
            "label": label,
            "token": places,
            "share": [float((lengths >= place).double().mean()) for place in places],
            "length": float(lengths.double().mean()),
        }
    )

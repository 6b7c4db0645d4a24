"""How far a sparse model's greedy text goes along with the dense model's, token by token."""

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor

from cats.criteria.generate import continue_prompts
from cats.criteria.masking import Masking, Policy

_PREFILL_TOKENS = 2048  # tokens of prompts read at once


def prompts(batches: Iterable[dict[str, Tensor]]) -> list[list[int]]:
    """The token ids of each row of `batches` (as of `cats.corpora.batches`), without padding."""
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def continuations(
    model, tokenizer, prompts: Sequence[Sequence[int]], *, new_tokens: int, policy: Policy | None = None
) -> tuple[list[list[int]], dict[str, dict]]:
    """Token ids that the model adds greedily to each prompt, and the sparsity realised by phase.

    At most `new_tokens` a prompt, up to and with an end-of-sequence token. A sparse model masks under
    `policy`, the paper's by default; what is realised is as `cats.masking.Masking.realised` gives it.
    """
    end = tokenizer.eos_token_id
    with Masking(model, policy) as masking:
        added = continue_prompts(
            model,
            prompts,
            new_tokens=new_tokens,
            eos=[] if end is None else [end],
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
    """Share of prompts whose texts agree up to each token: label, token, share, and the mean `length`.

    Two texts that end alike before the longest one does agree to its end.
    """
    longest = max(len(ids) for ids in dense)
    lengths = torch.tensor(
        [longest if list(a) == list(b) else common(a, b) for a, b in zip(dense, sparse, strict=True)]
    )
    places = range(longest + 1)
    return pd.DataFrame(
        {
            "label": label,
            "token": places,
            "share": [float((lengths >= place).double().mean()) for place in places],
            "length": float(lengths.double().mean()),
        }
    )

"""Greedy generation by a sparse model that the dense one corrects every few tokens (Sirius, arXiv
2409.03856)."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from cats.continuation import cut, left_padded, read_prompts
from cats.errors import CatsError
from cats.masking import Masking

_LOGITS = 1 << 26  # logits raised to fp32 at a time: 268 MB


@torch.inference_mode()
def continue_corrected(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    eos: Sequence[int],
    ended: Callable[[list[int]], int | None],
    masking: Masking,
    prefill_tokens: int,
    period: int,
    likelihood: float,
    counts: Counter,
) -> list[list[int]]:
    """As `cats.continuation.continue_prompts`, in rounds of `period` sparse steps and one dense call.

    The dense call reads the round's tokens again, so the cache holds the dense model's keys and values, and
    says how likely each next token was. From the first that it gives less than `likelihood` on, the round is
    undone, and its own greedy token comes in that place. Rows go in step: what a row has undone stays in the
    cache and is masked. `counts` gains sparse_steps, dense_steps (of each row until it ended) and tokens.
    Raises CatsError for a cache that cannot be cut back.
    """
    ids, valid = left_padded(prompts, model.device)
    cache, following = read_prompts(model, ids, valid, masking, prefill_tokens)
    if any(type(layer).__name__ != "DynamicLayer" for layer in cache.layers):
        raise CatsError("sirius cannot go back in a cache with sliding windows: use another rule or model.")
    lengths = valid.sum(1)
    added: list[list[int]] = [[] for _ in prompts]
    rounds = torch.zeros(len(prompts), dtype=torch.int64)
    results: list[list[int] | None] = [None] * len(prompts)
    masking.start_rows()
    while True:
        active = torch.tensor([result is None for result in results])
        rounds += active
        fed, proposed = _sparse_steps(model, cache, following, valid, lengths, masking, period)
        agreed, following = _correct(model, cache, fed, proposed, valid, lengths, masking, likelihood)
        place = torch.arange(period, device=fed.device)
        valid = torch.cat([valid, place < agreed[:, None]], dim=1)
        lengths = lengths + agreed
        for row, (tokens, count) in enumerate(zip(fed.tolist(), agreed.tolist(), strict=True)):
            if results[row] is None:
                added[row] += tokens[:count]
                results[row] = _finished(added[row], new_tokens, set(eos), ended)
        if all(result is not None for result in results):
            break
    masking.count_rows(rounds * period)
    counts["sparse_steps"] += int(rounds.sum()) * period
    counts["dense_steps"] += int(rounds.sum())
    counts["tokens"] += sum(map(len, results))
    return results


def _sparse_steps(
    model,
    cache: DynamicCache,
    following: Tensor,
    valid: Tensor,
    lengths: Tensor,
    masking: Masking,
    period: int,
) -> tuple[Tensor, Tensor]:
    """(tokens read, tokens proposed behind each), [B, period]; the cache is as before."""
    fed, proposed = [], []
    mask = valid
    for step in range(period):
        fed.append(following)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        masking.begin("decode", torch.ones_like(mask[:, :1]))
        logits = _read(model, cache, following[:, None], mask, lengths + step)
        following = logits[:, -1].argmax(-1)
        proposed.append(following)
    cache.crop(-period)
    return torch.stack(fed, 1), torch.stack(proposed, 1)


def _correct(
    model,
    cache: DynamicCache,
    fed: Tensor,
    proposed: Tensor,
    valid: Tensor,
    lengths: Tensor,
    masking: Masking,
    likelihood: float,
) -> tuple[Tensor, Tensor]:
    """(how many of the tokens fed [B, P] stand, at least one; the token behind them), [B] each.

    The dense model reads them all, and they stay in the cache.
    """
    mask = torch.cat([valid, torch.ones_like(fed, dtype=torch.bool)], dim=1)
    masking.begin("prefill", torch.zeros_like(fed, dtype=torch.bool), dense=True)
    logits = _read(model, cache, fed, mask, lengths)
    wrong = _chances(logits, proposed) < likelihood
    period = fed.shape[1]
    first = torch.where(wrong.any(1), wrong.int().argmax(1), period - 1)[:, None]
    own = logits.argmax(-1).gather(1, first)[:, 0]
    behind = torch.where(wrong.any(1), own, proposed[:, -1])
    return first[:, 0] + 1, behind


def _chances(logits: Tensor, tokens: Tensor) -> Tensor:
    """The probability [B, P] of `tokens` under logits [B, P, V], raised to fp32 for a few rows at a time."""
    rows = max(1, _LOGITS // (logits.shape[1] * logits.shape[2]))
    found = []
    for part, wanted in zip(logits.split(rows), tokens.split(rows), strict=True):
        scores = part.float()
        found.append((scores.gather(2, wanted[..., None]).squeeze(2) - scores.logsumexp(-1)).exp())
    return torch.cat(found)


def _read(model, cache: DynamicCache, ids: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    places = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
    return model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
    ).logits


def _finished(ids: list[int], new_tokens: int, eos: set[int], ended: Callable) -> list[int] | None:
    """The row's result, None while it goes on."""
    ids = ids[:new_tokens]
    over = len(ids) == new_tokens or not eos.isdisjoint(ids) or ended(ids) is not None
    return cut(ids, eos, ended) if over else None

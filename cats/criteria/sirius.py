"""Sirius (arXiv 2409.03856): CATS generates, and every few tokens the dense model corrects it.

Ambiguous in the source: its sparse model ranks |SiLU(x W_gate)| by token, here CATS has its thresholds, so
that what the correction adds is seen alone; its tree of candidates is left out; the period (16 there) and
the least likelihood (0.1 in its instructions) are options there and fixed here. As in its code, likelihood
is at temperature 0.6, a round's last token is always the dense model's, and so is the reading of the prompt,
whatever the policy says. A dense step reads all weights once, for the tokens of a whole round. Likelihood
tasks generate nothing: there it is CATS.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from cats.calibration.calibrate import calibrate
from cats.core.accounting import Accounting
from cats.criteria.generate import cut, left_padded, read_prompts
from cats.criteria.masking import Masking
from cats.criteria.rule import Rule, ThresholdFit, register
from cats.errors import CatsError

_LOGITS = 1 << 26  # logits raised to fp32 at a time: 268 MB

PERIOD = 16  # tokens, one of them by the dense model
LIKELIHOOD = 0.1
TEMPERATURE = 0.6


@dataclass
class SiriusFit(ThresholdFit):
    """The thresholds of CATS; generation is corrected, and its steps are counted."""

    counts: Counter = field(default_factory=Counter)

    def continuing(self, sparsity: float) -> Callable:
        return partial(
            continue_corrected,
            period=PERIOD,
            likelihood=LIKELIHOOD,
            temperature=TEMPERATURE,
            counts=self.counts,
        )

    def counted(self) -> dict[str, int]:
        names = ("sparse_steps", "dense_steps", "tokens")
        counts = {f"corrected_{name}": self.counts[name] for name in names}
        self.counts.clear()
        return counts

    def model_sparsity(self, shape: Accounting, sparsity: float) -> float:
        """At most: a dense step for every round of PERIOD tokens, none of them undone."""
        return shape.model_sparsity(sparsity) * (PERIOD - 1) / PERIOD

    def bytes_per_token(self, shape: Accounting, sparsity: float, bytes_per_weight: float = 2) -> float:
        """At least, as `model_sparsity`."""
        dense = shape.bytes_per_token(bytes_per_weight=bytes_per_weight)
        return ((PERIOD - 1) * shape.bytes_per_token(sparsity, bytes_per_weight) + dense) / PERIOD


@register
class Sirius(Rule):
    """The rule `sirius`: its sparsity is the gate sparsity of CATS between corrections."""

    name = "sirius"
    title = "Sirius (CATS, corrected)"
    what = f"CATS generates, the dense model corrects every {PERIOD} tokens (Sirius)"

    def sparsity_for(self, shape, model_sparsity):
        return super().sparsity_for(shape, model_sparsity * PERIOD / (PERIOD - 1))

    def calibrate(self, model, batches, *, source=None, progress=True) -> SiriusFit:
        return SiriusFit(self.name, calibrate(model, batches, source=source, progress=progress))


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
    temperature: float,
    counts: Counter,
) -> list[list[int]]:
    """As `cats.criteria.generate.continue_prompts`, in rounds of `period` tokens.

    All but one token of a round come by sparse steps, then there is one dense call. Prompts are read by the
    dense model, whatever the policy. The dense call reads the round's tokens again, so the cache holds the
    dense model's keys and values, and says how likely each was, at `temperature`. From the first that it
    gives less than `likelihood` on, the round is undone. The token behind those that stand is the dense
    model's. Sequences go in step: what one has undone stays in the cache and is masked. `counts` gains
    sparse_steps, dense_steps (of each sequence until it ended) and tokens. Raises CatsError for a cache that
    cannot be cut back.
    """
    ids, valid = left_padded(prompts, model.device)
    cache, following = read_prompts(model, ids, valid, masking, prefill_tokens, dense=True)
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
        round_ids = _sparse_steps(model, cache, following, valid, lengths, masking, period)
        logits = _dense_step(model, cache, round_ids, valid, lengths, masking)
        agreed, following = _agreed(logits, round_ids, likelihood, temperature)
        position = torch.arange(period, device=agreed.device)
        valid = torch.cat([valid, position < agreed[:, None]], dim=1)
        lengths = lengths + agreed
        for row, (tokens, count) in enumerate(zip(round_ids.tolist(), agreed.tolist(), strict=True)):
            if results[row] is None:
                added[row] += tokens[:count]
                results[row] = _finished(added[row], new_tokens, set(eos), ended)
        if all(result is not None for result in results):
            break
    masking.count_rows(rounds * (period - 1))
    counts["sparse_steps"] += int(rounds.sum()) * (period - 1)
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
) -> Tensor:
    """`following` [B] and what the sparse model puts behind it, [B, period]; the cache is as before."""
    ids, mask = [following], valid
    for step in range(period - 1):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        masking.begin("decode", torch.ones_like(mask[:, :1]))
        logits = _read(model, cache, ids[-1][:, None], mask, lengths + step)
        ids.append(logits[:, -1].argmax(-1))
    cache.crop(1 - period)
    return torch.stack(ids, 1)


def _dense_step(
    model, cache: DynamicCache, ids: Tensor, valid: Tensor, lengths: Tensor, masking: Masking
) -> Tensor:
    """Logits [B, P, V] of the dense model behind each of ids [B, P], which stay in the cache."""
    mask = torch.cat([valid, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    masking.begin("prefill", torch.zeros_like(ids, dtype=torch.bool), dense=True)
    return _read(model, cache, ids, mask, lengths)


def _agreed(logits: Tensor, ids: Tensor, likelihood: float, temperature: float) -> tuple[Tensor, Tensor]:
    """(how many of ids [B, P] stand, at least one; the dense model's token behind them), [B] each."""
    wrong = _chances(logits[:, :-1], ids[:, 1:], temperature) < likelihood
    last = torch.where(wrong.any(1), wrong.int().argmax(1), ids.shape[1] - 1)[:, None]
    return last[:, 0] + 1, logits.argmax(-1).gather(1, last)[:, 0]


def _chances(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """The probability [B, P] of `tokens` under logits [B, P, V], raised to fp32 for a few rows at a time."""
    rows = max(1, _LOGITS // (logits.shape[1] * logits.shape[2]))
    chances = []
    for part, wanted in zip(logits.split(rows), tokens.split(rows), strict=True):
        scores = part.float() / temperature
        chances.append((scores.gather(2, wanted[..., None]).squeeze(2) - scores.logsumexp(-1)).exp())
    return torch.cat(chances)


def _read(model, cache: DynamicCache, ids: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
    return model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).logits


def _finished(ids: list[int], new_tokens: int, eos: set[int], ended: Callable) -> list[int] | None:
    """The row's result, None while it goes on."""
    ids = ids[:new_tokens]
    over = len(ids) == new_tokens or not eos.isdisjoint(ids) or ended(ids) is not None
    return cut(ids, eos, ended) if over else None

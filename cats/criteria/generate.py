"""Greedy continuation of many prompts at once, of which each ends at a step of its own."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from cats.criteria.masking import Masking

_CHECK = 16  # steps between two looks at the text: each look is a synchronisation
_LEAVING = 0.25  # of the rows, from which on those that are over leave the batch


@torch.inference_mode()
def continue_prompts(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    eos: Sequence[int],
    ended: Callable[[list[int]], int | None],
    masking: Masking,
    prefill_tokens: int,
) -> list[list[int]]:
    """Token ids that `model` adds to each prompt: at most `new_tokens`, up to and with the first of `eos`.

    `ended(ids)` says after how many tokens a row was over for another reason, None while it is not. The
    prompts are read in parts of about `prefill_tokens` tokens. `masking` counts each row's own steps alone;
    rows that are over leave the batch.
    """
    ids, valid = left_padded(prompts, model.device)
    width = ids.shape[1]
    lengths = valid.sum(1)
    cache, following = read_prompts(model, ids, valid, masking, prefill_tokens)
    mask = torch.cat([valid, valid.new_ones(len(ids), new_tokens)], dim=1)
    ends = torch.tensor(list(eos), device=ids.device)
    tokens = ids.new_zeros(len(ids), new_tokens)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    places = torch.arange(len(ids))  # in `prompts`, of the rows that go on
    added: list[list[int]] = [[] for _ in prompts]
    masking.start_rows()
    step = counted = 0
    while True:
        tokens[:, step] = following
        done |= torch.isin(following, ends)
        step += 1
        if step == new_tokens or step % _CHECK == 0:
            over = _over(tokens[:, :step], done, ended) | (step == new_tokens)
            done = over.to(ids.device)
            if over.float().mean() >= _LEAVING:
                for place, row in zip(places[over].tolist(), tokens[done, :step].tolist(), strict=True):
                    added[place] = cut(row, set(eos), ended)
                steps = torch.tensor([len(added[place]) or step for place in places.tolist()])
                masking.count_rows(steps - 1 - counted)  # the first token came with the prompt
                if over.all():
                    return added
                counted, places, stay = step - 1, places[~over], (~done).nonzero()[:, 0]
                following, tokens, mask, lengths, done = (
                    rows[stay] for rows in (following, tokens, mask, lengths, done)
                )
                cache.batch_select_indices(stay)
                masking.keep_rows(stay)
                masking.start_rows()
        masking.begin("decode", ~done[:, None])
        logits = model(
            input_ids=following[:, None],
            attention_mask=mask[:, : width + step].long(),
            position_ids=(lengths + step - 1)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits
        following = logits[:, -1].argmax(-1)


def left_padded(rows: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], padded on the left so that all end in one column, and which are no padding."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = tokens
    valid = np.arange(width) >= width - np.array([[len(tokens)] for tokens in rows])
    return torch.from_numpy(ids).to(device), torch.from_numpy(valid).to(device)


def read_prompts(
    model, ids: Tensor, valid: Tensor, masking: Masking, prefill_tokens: int, *, dense: bool = False
) -> tuple[DynamicCache, Tensor]:
    """The cache behind all prompts, and the token that follows each; `dense` masks none of their tokens."""
    step = max(1, prefill_tokens // ids.shape[1])
    caches, following = [], []
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        cache = DynamicCache(config=model.config)
        masking.begin("prefill", valid[part], prompt=valid[part].sum(1), dense=dense)
        logits = model(
            input_ids=ids[part],
            attention_mask=valid[part].long(),
            position_ids=(valid[part].cumsum(1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        caches.append(cache)
        following.append(logits[:, -1].argmax(-1))
    whole = caches[0]
    for number, layer in enumerate(whole.layers if len(caches) > 1 else ()):
        layer.keys = torch.cat([cache.layers[number].keys for cache in caches])
        layer.values = torch.cat([cache.layers[number].values for cache in caches])
        for cache in caches[1:]:
            cache.layers[number].keys = cache.layers[number].values = None
    return whole, torch.cat(following)


def _over(tokens: Tensor, done: Tensor, ended: Callable) -> Tensor:
    """Which rows are over [B], on the CPU: those that are `done`, and those whose text is."""
    pairs = zip(tokens.tolist(), done.tolist(), strict=True)
    return torch.tensor([over or ended(ids) is not None for ids, over in pairs])


def cut(ids: list[int], eos: set[int], ended: Callable) -> list[int]:
    """`ids` up to and with the first of `eos`, or less where `ended` says that the text was over before."""
    first = next((place + 1 for place, token in enumerate(ids) if token in eos), len(ids))
    length = ended(ids[:first])
    return ids[: first if length is None else length]

"""lm-eval's Hugging Face model with batches by tokens, contexts read once, and the masking of
`cats.masking`."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from cats.criteria.generate import continue_prompts, left_padded
from cats.criteria.masking import Masking
from cats.errors import CatsError
from cats.evaluation.hflm_generate import GreedyHFLM

_CPU_TOKENS = 2048
_GPU_TOKENS = 16_384  # larger batches are no faster on an H100 and hold more padding
_BUCKET = 16  # tokens: lengths this near are taken for equal when batches are made
_SHAREABLE = {"DynamicLayer", "DynamicSlidingWindowLayer"}
_SHORTEST = 8  # shorter contexts are not worth a call of their own
_PADDING = 64  # at most so much padding of a context in its batch, which counts in a sliding window
_KEPT = 1 << 31  # logits of one call, at most: 4 GB in 16 bits
_COPIES = 4  # of the keys and values of a batch of contexts, at most, for the continuations of one call
_LOGITS = 1 << 26  # logits raised to fp32 at a time: 268 MB


@dataclass
class _Group:
    """Requests with one context: `context` token ids, and of each continuation its place in the results and
    ids.
    """

    context: list[int]
    continuations: list[tuple[int, list[int]]]

    @property
    def longest(self) -> int:
        return max(len(ids) for _, ids in self.continuations)


class MaskedHFLM(GreedyHFLM):
    """A drop-in for lm-eval's HFLM over a loaded model: the same requests, prompts and scores, in less
    time.

    Continuations of one context are scored over one reading of it where the model's cache allows; a batch
    holds about `tokens` tokens, halved when memory does not suffice. Log-probabilities are summed in fp32.
    `masking` is told of each call. Generation is greedy search by `continuing`, of the interface of
    `cats.continuation.continue_prompts`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        masking: Masking | None = None,
        tokens: int | None = None,
        continuing: Callable = continue_prompts,
    ):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=1 << 20
        )  # rolling windows all at once
        self.masking = masking or Masking(model)
        self.tokens = tokens or (_GPU_TOKENS if self.device.type == "cuda" else _CPU_TOKENS)
        self.continuing = continuing
        self.processed = 0  # tokens that the model has read, padding excluded
        self.label = "requests"
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def encode(self, requests) -> list[tuple]:
        """The token ids of log-likelihood requests, as `loglikelihood` makes them: (strings, context,
        continuation).
        """
        kept: list[tuple] = []
        scorer = self._loglikelihood_tokens
        self._loglikelihood_tokens = lambda encoded, **_: kept.extend(encoded)
        try:
            self.loglikelihood(requests, disable_tqdm=True)
        finally:
            self._loglikelihood_tokens = scorer
        return kept

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """(log-probability, is greedy) of each (strings, context ids, continuation ids), in order."""
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        single, shared = self._groups(requests)
        with tqdm(total=len(requests), desc=self.label, unit="req", disable=disable_tqdm or None) as bar:
            for groups, score in ((shared, self._score_shared), (single, self._score_single)):
                for batch in self._batches(groups, shared=groups is shared):
                    self._scored(batch, score, results)
                    bar.update(sum(len(group.continuations) for group in batch))
        return results

    def _scored(self, batch: list[_Group], score, results: list) -> None:
        """Score a batch; where memory does not suffice, its halves, and smaller batches from then on."""
        try:
            found = score(batch)
        except torch.cuda.OutOfMemoryError:
            found = None
        if found is not None:
            for (place, _), value in zip(
                (item for group in batch for item in group.continuations), found, strict=True
            ):
                results[place] = value
            return
        torch.cuda.empty_cache()
        if len(batch) == 1:
            raise CatsError(
                f"A request of {len(batch[0].context)} tokens does not fit the GPU: use a larger one."
            )
        self.tokens = max(self.tokens // 2, 1024)
        middle = len(batch) // 2
        self._scored(batch[:middle], score, results)
        self._scored(batch[middle:], score, results)

    def _groups(self, requests) -> tuple[list[_Group], list[_Group]]:
        """(groups whose context is read together with what is scored, groups whose context is read once for
        all).
        """
        by_context: dict[tuple, list] = {}
        for place, (_, context, continuation) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append((place, list(continuation)))
        single, shared = [], []
        limit = self._shareable()
        for context, continuations in by_context.items():
            group = _Group(list(context), continuations)
            if len(context) + group.longest > self.max_length + 1:
                single += [_truncated(group.context, item, self.max_length + 1) for item in continuations]
            elif group.longest == 1:
                single.append(group)
            elif len(continuations) > 1 and _SHORTEST <= len(context) < limit - group.longest - _PADDING:
                shared.append(group)
            else:
                single += [_Group(group.context, [item]) for item in continuations]
        return single, shared

    def _shareable(self) -> int:
        """Tokens of a context and what follows it, with padding, from which on they are read in one call.

        0 where they always are: a mask depends on the length of the whole, or the cache is a special one.
        """
        if self.masking.whole_sequence:
            return 0
        layers = DynamicCache(config=self.model.config).layers
        if any(type(layer).__name__ not in _SHAREABLE for layer in layers):
            return 0
        windows = [layer.sliding_window for layer in layers if getattr(layer, "sliding_window", None)]
        return min(windows, default=1 << 30)

    def _batches(self, groups: list[_Group], *, shared: bool) -> Iterator[list[_Group]]:
        """Batches of similar lengths, longest first, of at most `tokens` tokens with padding.

        Of shared contexts first their own lengths are similar, then those of the continuations.
        """
        vocabulary = self.model.config.get_text_config().vocab_size

        def order(group: _Group) -> tuple[int, int]:
            length = len(group.context) + (0 if shared else group.longest)
            return -(length // _BUCKET), -group.longest

        batch: list[_Group] = []
        context = longest = 0
        for group in sorted(groups, key=order):
            wider, longer = max(context, len(group.context)), max(longest, group.longest)
            rows = len(batch) + 1
            full = (wider + longer) * rows > self.tokens or longer * rows * vocabulary > _KEPT
            if batch and (full or wider - len(group.context) >= _PADDING):
                yield batch
                batch, wider, longer = [], len(group.context), group.longest
            batch.append(group)
            context, longest = wider, longer
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_single(self, batch: list[_Group]) -> list[tuple[float, bool]]:
        """One call: context and continuation but for its last token; several one-token continuations share
        it.
        """
        rows = [group.context + group.continuations[0][1][:-1] for group in batch]
        prompt = torch.tensor([len(group.context) - 1 for group in batch])
        logits = self._call(rows, keep=max(group.longest for group in batch), prompt=prompt)
        targets, owners = [], []
        for row, group in enumerate(batch):
            for _, continuation in group.continuations:
                targets.append(continuation)
                owners.append(row)
        return self._gather(logits, targets, owners)

    @torch.inference_mode()
    def _score_shared(self, batch: list[_Group]) -> list[tuple[float, bool]]:
        """The contexts once, then their continuations, of similar length together, over the contexts'
        cache.
        """
        contexts = [group.context for group in batch]
        cache = DynamicCache(config=self.model.config)
        first = self._call(contexts, cache=cache, keep=1)
        kept = [
            (layer.keys, layer.values, getattr(layer, "cumulative_length", None)) for layer in cache.layers
        ]
        targets = [(row, ids) for row, group in enumerate(batch) for _, ids in group.continuations]
        found = self._gather(first, [ids[:1] for _, ids in targets], [row for row, _ in targets])
        longer = [place for place, (_, ids) in enumerate(targets) if len(ids) > 1]
        longer.sort(key=lambda place: -len(targets[place][1]))
        for part in self._parts(longer, targets, cache.get_seq_length()):
            rows = [targets[place][0] for place in part]
            ids = [targets[place][1] for place in part]
            _put_back(cache, kept, rows)
            logits = self._call(
                [each[:-1] for each in ids], cache=cache, behind=[len(contexts[row]) for row in rows]
            )
            more = self._gather(logits, [each[1:] for each in ids], range(len(part)))
            for place, (log, greedy) in zip(part, more, strict=True):
                found[place] = (found[place][0] + log, found[place][1] and greedy)
        return found

    def _parts(self, places: list[int], targets: list[tuple], width: int) -> Iterator[list[int]]:
        """Continuations, longest first, cut into calls. A GPU waits for launches, so it gets few calls; a CPU
        waits for products, so it gets little padding.
        """
        limit = self.tokens if self.device.type == "cuda" else self.tokens // 4
        limit = min(limit, _KEPT // self.model.config.get_text_config().vocab_size)
        while places:
            rows = max(1, min(limit // len(targets[places[0]][1]), _COPIES * self.tokens // width))
            yield places[:rows]
            places = places[rows:]

    def _call(
        self,
        rows: list[list[int]],
        *,
        keep: int | None = None,
        cache=None,
        behind: list[int] = (),
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Logits of one call of the model, told to `masking`; `behind`: lengths of what the cache has of
        each row; `prompt` as `cats.sites.Call`.
        """
        ids, valid = left_padded(rows, self.device)
        before = 0
        mask = valid
        if behind:
            before = torch.tensor(behind, device=self.device)[:, None]
            width = cache.get_seq_length()
            mask = torch.cat([torch.arange(width, device=self.device) >= width - before, valid], dim=1)
        self.masking.begin("prefill", valid, before=before, prompt=prompt)
        self.processed += sum(map(len, rows))
        options = {"logits_to_keep": keep} if keep and self._keeps else {}
        return self.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(valid.cumsum(1) - 1).clamp_min(0) + before,
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        ).logits

    def _gather(
        self, logits: Tensor, targets: list[list[int]], owners: Sequence[int]
    ) -> list[tuple[float, bool]]:
        """Sum of fp32 log-probabilities and greediness of `targets`, which end where logits [B, K, V] of
        `owners` do.
        """
        wanted, valid = left_padded(targets, self.device)
        rows = torch.tensor(list(owners), device=self.device)
        step = max(1, _LOGITS // (wanted.shape[1] * logits.shape[-1]))
        sums, greedy = [], []
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            scores = logits[rows[part], -wanted.shape[1] :].float()
            picked = scores.gather(2, wanted[part, :, None]).squeeze(2) - scores.logsumexp(2)
            sums.append(picked.masked_fill(~valid[part], 0).sum(1))
            greedy.append(((scores.argmax(2) == wanted[part]) | ~valid[part]).all(1))
        return list(zip(torch.cat(sums).tolist(), torch.cat(greedy).tolist(), strict=True))


def _put_back(cache, kept, rows: list[int]) -> None:
    """The cache as it was behind the contexts: updates make new tensors, so the old ones are still whole."""
    for layer, (keys, values, length) in zip(cache.layers, kept, strict=True):
        everything = rows == list(range(len(keys)))
        layer.keys = keys if everything else keys[rows]
        layer.values = values if everything else values[rows]
        if length is not None:
            layer.cumulative_length = length


def _truncated(context: list[int], item: tuple[int, list[int]], length: int) -> _Group:
    """The end of a request that is too long for the model, as lm-eval cuts it; the continuation stays
    whole.
    """
    room = max(1, length - len(item[1]))
    return _Group(context[-room:], [item])

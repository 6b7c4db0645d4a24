"""Generation for `cats.evaluation.hflm`: lm-eval's `generate_until` by greedy search over large batches."""

import json
from collections.abc import Callable

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm.auto import tqdm

from cats.criteria.masking import Masking
from cats.errors import CatsError

_ROWS = 512  # prompts continued together
_KEYS = 32  # tokens in the cache, as a multiple of those of a call


class GreedyHFLM(HFLM):
    """What `cats.evaluation.hflm.MaskedHFLM` generates with; `masking`, `tokens`, `processed`, `label` and
    `continuing` are set there.
    """

    masking: Masking
    tokens: int
    processed: int
    label: str
    continuing: Callable

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """lm-eval's generation, greedy alone: the texts, cut where a stop sequence begins. Raises CatsError
        for sampling.
        """
        results: list[str | None] = [None] * len(requests)
        by_options: dict[str, list[tuple[int, list[int]]]] = {}
        for place, request in enumerate(requests):
            context, options = request.args
            by_options.setdefault(json.dumps(options, sort_keys=True), []).append((place, context))
        with tqdm(total=len(requests), desc=self.label, unit="req", disable=disable_tqdm or None) as bar:
            for key, items in by_options.items():
                self._generate(items, normalize_gen_kwargs(json.loads(key), self.max_gen_toks), results, bar)
        return results

    def _generate(self, items, options: dict, results: list, bar) -> None:
        if options.get("do_sample"):
            raise CatsError("This task asks for sampled text: use lm-eval itself, generation here is greedy.")
        stops = handle_stop_sequences(options.get("until"), eos=self.tok_decode(self.eot_token_id, False))
        new_tokens = options["max_gen_toks"]
        room = self.max_length - new_tokens
        if room < 1:
            raise CatsError(
                f"The task asks for {new_tokens} new tokens, the model reads {self.max_length} in all."
            )
        encoded = [(place, self.tok_encode(context, left_truncate_len=room)) for place, context in items]
        encoded.sort(key=lambda item: -len(item[1]))
        start = 0
        while start < len(encoded):
            rows = max(1, min(_ROWS, self._cache_tokens() // (len(encoded[start][1]) + new_tokens)))
            batch = encoded[start : start + rows]
            try:
                added = self.continuing(
                    self.model,
                    [ids for _, ids in batch],
                    new_tokens=new_tokens,
                    eos=self._eos(),
                    ended=lambda ids: self._over(ids, stops),
                    masking=self.masking,
                    prefill_tokens=self.tokens,
                )
            except torch.cuda.OutOfMemoryError as error:
                if self.tokens <= 1024:
                    raise CatsError(
                        "The GPU's memory does not suffice to generate: use a larger GPU."
                    ) from error
                torch.cuda.empty_cache()
                self.tokens //= 2
                continue
            for (place, ids), new in zip(batch, added, strict=True):
                results[place] = postprocess_generated_text(self.tok_decode(new), stops, None)
                self.processed += len(ids) + len(new)
            bar.update(len(batch))
            start += len(batch)

    def _cache_tokens(self) -> int:
        """Tokens whose keys and values may be in memory together."""
        limit = _KEYS * self.tokens
        if self.device.type != "cuda":
            return limit
        shape = self.model.config.get_text_config()
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        each = 2 * shape.num_hidden_layers * heads * size * self.model.dtype.itemsize
        # a growing cache is copied once a step: one layer is there twice, and fragments are left
        return min(limit, int(0.6 * torch.cuda.mem_get_info()[0] / each))

    def _eos(self) -> list[int]:
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        ids = ids if isinstance(ids, list) else [ids]
        return sorted({token for token in [*ids, self.eot_token_id] if token is not None})

    def _over(self, ids: list[int], stops: list[str]) -> int | None:
        """How many tokens it took until the text held a stop sequence, None where it holds none."""

        def holds(count: int) -> bool:
            text = self.tok_decode(ids[:count])
            return any(stop in text for stop in stops if stop)

        if not holds(len(ids)):
            return None
        low, high = 0, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

"""Tell the MLPs of a model with `prefill="dense"` whether a call reads a prompt: by what the cache holds."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from cats.core.activation import CatsMLP
from cats.errors import CatsError


class PromptWatch:
    """Hooks on a decoder that set `reading_prompt` of its sparse MLPs for the time of one call.

    A call on an empty cache reads a prompt, a call of one token on a filled cache decodes. Several tokens on
    a filled cache may be a later part of a prompt or candidates of speculative decoding: CatsError. Without a
    cache every call is a prompt. Of a decoder that keeps its past elsewhere nothing is known.
    """

    def __init__(self, decoder: nn.Module, mlps: Sequence[CatsMLP]):
        self.mlps = list(mlps)
        self.names = list(inspect.signature(decoder.forward).parameters)
        self.handles = [
            decoder.register_forward_pre_hook(self.begin, with_kwargs=True),
            decoder.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, decoder: nn.Module, positional: tuple, named: dict) -> None:
        """Before a call of the decoder."""
        given = dict(zip(self.names, positional, strict=False)) | named
        cache, ids, embeddings = (given.get(k) for k in ("past_key_values", "input_ids", "inputs_embeds"))
        if "past_key_values" not in self.names or (ids is None and embeddings is None):
            return
        tokens = ids.shape[-1] if ids is not None else embeddings.shape[-2]
        cached = 0 if cache is None else cache.get_seq_length()
        if isinstance(cached, torch.Tensor):  # a static cache: asking for one token's step would stop the GPU
            cached = 1 if tokens == 1 or torch.compiler.is_compiling() else int(cached)
        if tokens > 1 and cached > 0:
            raise CatsError(
                f'prefill="dense" cannot tell what {tokens} tokens on a cache that is not empty are, a later '
                'part of a prompt or candidates of speculative decoding: sparsify with prefill="masked".'
            )
        self._set(cached == 0)

    def end(self, *_) -> None:
        """After a call of the decoder, also one that failed."""
        self._set(None)

    def _set(self, reading: bool | None) -> None:
        for mlp in self.mlps:
            mlp.reading_prompt = reading

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for handle in self.handles:
            handle.remove()


_KEPT = "_cats_prompt_watch"  # where a decoder keeps its watch


def watch_prompts(model: nn.Module) -> None:
    """Put a PromptWatch on each decoder of `model` whose MLPs leave prompts dense, and off all others."""
    decoders = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for decoder in decoders:
        if _KEPT in decoder.__dict__:
            decoder.__dict__.pop(_KEPT).remove()
    seen: set[CatsMLP] = set()
    for decoder in reversed(decoders):  # a decoder stands behind the model that holds it
        mlps = [m for m in decoder.modules() if isinstance(m, CatsMLP) and m.prefill == "dense"]
        mine = [mlp for mlp in mlps if mlp not in seen]
        if mine:
            decoder.__dict__[_KEPT] = PromptWatch(decoder, mine)
            seen.update(mine)

"""Faster attention for one-token steps, installed on dense and sparse models alike: fused QKV and one launch.

With the MLP at the memory roofline, the launches around attention are what is left of a token's time. The
model's own attention keeps serving prefill, training, other caches and other architectures.
"""

import torch
import torch.nn.functional as F
from cats_kernels.decode_attention import arrival_counters, decode_attention, supports
from torch import nn
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from cats.core.activation import is_hooked


class _OneTokenForward:
    """Before a Transformers attention class: a one-token step on a static cache takes the fused op.

    `replaced`: that class. `tied`: whether q, k and v still are views of `qkv_weight`; looked up outside of
    compiled steps only.
    """

    replaced: type[nn.Module]

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ):
        if past_key_values is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self._look()
        layer = self._layer(past_key_values)
        if layer is None or not self._fits(hidden_states, position_embeddings, attention_mask, layer):
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        batch = hidden_states.shape[0]
        cos, sin = position_embeddings  # [1 or B, 1, D]
        qkv = F.linear(hidden_states[:, 0], self.qkv_weight, self.qkv_bias)
        y = decode_attention(
            qkv,
            cos[:, 0].contiguous(),
            sin[:, 0].contiguous(),
            layer.keys,
            layer.values,
            layer.cumulative_length,
            None if attention_mask is None else attention_mask[:, 0, 0].contiguous(),
            self.arrivals,
            self.scaling,
        )
        layer.advance() if isinstance(layer, SharedLayer) else layer.cumulative_length.add_(1)
        return self.o_proj(y.view(batch, 1, -1)), None

    def _look(self) -> None:
        """Keep `tied` true to the weights, which may have been loaded, wrapped or cast since."""
        tied = _tied(self)
        if tied != self.tied:
            self.tied = tied

    def _apply(self, fn, recurse=True):
        was_tied = _tied(self)
        super()._apply(fn, recurse)
        if was_tied and recurse:  # each was moved or cast by itself
            _share(self)
        return self

    def _layer(self, cache: Cache | None) -> StaticLayer | None:
        """This layer's part of a static cache, once prefill has filled it; None for any other cache."""
        if cache is None or len(cache.layers) <= self.layer_idx:
            return None
        layer = cache.layers[self.layer_idx]
        plain = isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer)
        return layer if plain and layer.is_initialized else None

    def _fits(self, hidden_states, position_embeddings, mask, layer) -> bool:
        batch, tokens, _ = hidden_states.shape
        kv_heads, length = layer.keys.shape[1], layer.keys.shape[2]
        return (
            tokens == 1
            and self.tied
            and _plain_projections(self)
            and not torch.is_grad_enabled()
            and position_embeddings is not None
            and position_embeddings[0].shape[-1] == self.head_dim
            and batch * kv_heads <= self.arrivals.shape[0]
            and (mask is None or (mask.dtype == torch.bool and mask.shape[1:] == (1, 1, length)))
            and supports(self.head_dim, hidden_states.device.type)
        )


class OneTokenLlamaAttention(_OneTokenForward, LlamaAttention):
    replaced = LlamaAttention


class OneTokenMistralAttention(_OneTokenForward, MistralAttention):
    replaced = MistralAttention


class OneTokenQwen2Attention(_OneTokenForward, Qwen2Attention):
    replaced = Qwen2Attention


# Of attention with rotary positions and grouped queries, no norm on q or k, no soft cap.
_ONE_TOKEN = {
    kind.replaced: kind for kind in (OneTokenLlamaAttention, OneTokenMistralAttention, OneTokenQwen2Attention)
}


class SharedLayer(StaticLayer):
    """One layer of a static cache whose layers count tokens in one shared tensor, advanced once a step."""

    def __init__(self, max_cache_len: int, position: torch.Tensor, last: bool):
        super().__init__(max_cache_len=max_cache_len)
        self.cumulative_length = position
        self.last = last

    def advance(self, tokens: int = 1) -> None:
        if self.last:
            self.cumulative_length.add_(tokens)

    def update(self, key_states, value_states, *args, **kwargs):
        """Write [B, Hkv, T, D] keys and values behind those that are there; returns the whole buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        rows = torch.arange(tokens, device=key_states.device) + self.cumulative_length
        self.keys.index_copy_(2, rows, key_states)
        self.values.index_copy_(2, rows, value_states)
        self.advance(tokens)
        return self.keys, self.values


class DecodeCache(Cache):
    """Static key-value cache for `length` tokens, one counter for all layers (Transformers: one each)."""

    def __init__(self, config, length: int, *, device="cpu"):
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        torch._dynamo.mark_static_address(self.position)
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(
            layers=[SharedLayer(length, self.position, index == layers - 1) for index in range(layers)]
        )

    def reset(self) -> None:
        """Forget every token; rows behind `position` are never read, so they need no clearing."""
        self.position.zero_()


def install(model: nn.Module, *, batch: int = 1) -> int:
    """Give `model` the one-token path for up to `batch` rows; returns how many attention modules took it.

    q, k and v weights become views of one [Hq D + 2 Hkv D, d] tensor: no second copy, same state dict.
    Modules of other classes, or with wrapped projections (LoRA, quantised), keep their own forward; so do,
    for as long, those that are wrapped later or whose weights are set to other tensors (until `tie`).
    """
    fits = [m for m in model.modules() if type(m) in _ONE_TOKEN and _plain_projections(m)]
    for module in fits:
        _fuse(module, batch)
        module.__class__ = _ONE_TOKEN[type(module)]
    return len(fits)


def tie(model: nn.Module) -> None:
    """Fuse again, where `install` had, q, k and v weights that were set to other tensors since."""
    for module in model.modules():
        if isinstance(module, _OneTokenForward):
            if _plain_projections(module) and not _tied(module):
                _fuse(module, module.arrivals.shape[0] // (module.k_proj.out_features // module.head_dim))
            module._look()


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if isinstance(module, _OneTokenForward):
            for linear in _projections(module):
                for parameter in getattr(linear, "base_layer", linear).parameters(recurse=False):
                    parameter.data = parameter.data.clone()
            del module.qkv_weight, module.qkv_bias, module.arrivals, module.tied
            module.__class__ = module.replaced


def _projections(module: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    return module.q_proj, module.k_proj, module.v_proj


def _plain_projections(module: nn.Module) -> bool:
    """Whether a fused weight may be read in place of calling them: no adapter, quantisation or hook."""
    return (
        all(
            type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not is_hooked(linear)
            for linear in _projections(module)
        )
        and len({linear.bias is None for linear in _projections(module)}) == 1
    )


def _tied(module: nn.Module) -> bool:
    """Whether the weights, and biases, of q, k and v lie behind each other in the fused ones."""
    if not _plain_projections(module):
        return False
    for fused, parts in _fused_and_parts(module):
        address = fused.data_ptr()
        for part in parts:
            if part is None or part.data_ptr() != address:
                return False
            address += part.numel() * part.element_size()
    return (module.qkv_bias is None) == (module.q_proj.bias is None)


def _fused_and_parts(module: nn.Module):
    """The fused weight with those of q, k and v; the fused bias with theirs, where there is one."""
    yield module.qkv_weight, [linear.weight for linear in _projections(module)]
    if module.qkv_bias is not None:
        yield module.qkv_bias, [linear.bias for linear in _projections(module)]


def _share(module: nn.Module) -> None:
    """Make the weights and biases of q, k and v views of the fused ones."""
    for fused, parts in _fused_and_parts(module):
        for part, view in zip(parts, fused.split([len(part) for part in parts]), strict=True):
            part.data = view


@torch.no_grad()
def _fuse(module: nn.Module, batch: int) -> None:
    weight = torch.cat([linear.weight for linear in _projections(module)])
    biases = [linear.bias for linear in _projections(module)]
    kv_heads = module.k_proj.out_features // module.head_dim
    module.register_buffer("qkv_weight", weight, persistent=False)
    module.register_buffer("qkv_bias", None if biases[0] is None else torch.cat(biases), persistent=False)
    module.register_buffer("arrivals", arrival_counters(batch, kv_heads, weight.device), persistent=False)
    _share(module)
    module.tied = True

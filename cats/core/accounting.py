"""Sparsity, bytes and FLOPs of one decoded token, and the byte bound on any speed-up, from a model's shapes.

Decoding one token reads every weight once, so bytes bound the time. CATS at gate sparsity s leaves out
the share s of W_up and of W_down; W_gate, attention and the head are read whole.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from cats.core.structure import find_gated_mlps
from cats.errors import CatsError


@dataclass(frozen=True)
class Accounting:
    """Counts of weights in all layers together, without norms, biases and the embedding (< 0.1 % of reads).

    `mlp_weights` = gate, up and down; `skippable_weights` = up and down; `attention_weights` = every other
    linear layer of the decoder; `head_weights` = the output head, tied or not, 0 where it is not counted.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    mlp_weights: int
    skippable_weights: int
    attention_weights: int
    head_weights: int

    @property
    def block_weights(self) -> int:
        """All linear weights of the blocks: what model-level sparsity is a share of."""
        return self.mlp_weights + self.attention_weights

    @property
    def max_model_sparsity(self) -> float:
        """Model-level sparsity at s = 1, which CATS cannot exceed."""
        return self.skippable_weights / self.block_weights

    @property
    def mlp_share(self) -> float:
        """Share of a decoded token's weight bytes that the gated MLPs read when dense."""
        return self.mlp_weights / (self.block_weights + self.head_weights)

    def model_sparsity(self, gate_sparsity: float) -> float:
        """Model-level sparsity, the share of the blocks' linear weights left out."""
        return _share(gate_sparsity) * self.max_model_sparsity

    def gate_sparsity(self, model_sparsity: float) -> float:
        """The gate sparsity that gives a model-level sparsity; CatsError where CATS cannot reach it."""
        if _share(model_sparsity) > self.max_model_sparsity:
            raise CatsError(
                f"CATS cannot reach a model-level sparsity of {model_sparsity:.1%} here: "
                f"up_proj and down_proj are {self.max_model_sparsity:.1%} of the blocks' weights."
            )
        return model_sparsity / self.max_model_sparsity

    def weights_read(self, gate_sparsity: float = 0.0) -> float:
        """Weights read for one decoded token at batch 1."""
        return self.block_weights + self.head_weights - _share(gate_sparsity) * self.skippable_weights

    def bytes_per_token(self, gate_sparsity: float = 0.0, bytes_per_weight: float = 2) -> float:
        """Weight bytes read for one decoded token at batch 1, without KV cache and activations."""
        return self.weights_read(gate_sparsity) * bytes_per_weight

    def speedup_bound(self, gate_sparsity: float) -> float:
        """Dense over sparse bytes of the whole model: decode at batch 1 cannot gain more."""
        return self.weights_read() / self.weights_read(gate_sparsity)

    def mlp_speedup_bound(self, gate_sparsity: float) -> float:
        """The same for the gated MLP alone, 1 / (1 - 2s/3)."""
        return self.mlp_weights / (self.mlp_weights - _share(gate_sparsity) * self.skippable_weights)


def account(model: PretrainedConfig | nn.Module, *, lm_head: bool = True) -> Accounting:
    """Count the weights of a Transformers configuration (built without memory), or of a model.

    Counting layers as built leaves nothing to guess: grouped-query attention, fused projections, head sizes
    and a text model inside a multimodal configuration come out right. `lm_head` False leaves out the head.
    Raises CatsError for a model with experts or without gated MLPs.
    """
    if isinstance(model, PretrainedConfig):
        text = model.get_text_config()
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(text)
        except ValueError as error:
            raise CatsError(
                f"A configuration of type {text.model_type!r} has no causal language model."
            ) from error
    mlps = find_gated_mlps(model)
    mlp_weights = sum(3 * mlp.hidden_size * mlp.intermediate_size for mlp in mlps)
    linear = sum(weight.numel() for weight in _linear_weights(model.get_decoder()))
    head = model.get_output_embeddings() if lm_head else None
    return Accounting(
        hidden_size=mlps[0].hidden_size,
        intermediate_size=mlps[0].intermediate_size,
        layers=len(mlps),
        mlp_weights=mlp_weights,
        skippable_weights=mlp_weights * 2 // 3,
        attention_weights=linear - mlp_weights,
        head_weights=head.weight.numel() if head is not None else 0,
    )


def _linear_weights(decoder: nn.Module):
    """The weights [out, in] of every Linear, and of the frozen Linear inside an adapter."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            yield module.weight


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise CatsError(f"Sparsity {value!r} is outside [0, 1]: it is a share of weights or activations.")
    return value

"""Tiny models whose greedy tokens are no matter of rounding, on a GPU or for Triton's interpreter."""

import torch
import triton
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # biases on q, k and v
}


def toy(kind="llama", seed=0):
    config, cls = CLASSES[kind]
    torch.manual_seed(seed)
    model = cls(
        config(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # far from uniform logits, so that the argmax is no matter of rounding
            parameter.data.normal_(0, 3.0 if "embed" in name else 0.3)
    return model.eval().to(DEVICE)


def prompt(batch=1, tokens=9):
    return torch.randint(0, 97, (batch, tokens), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def by_transformers(model, ids, new, **options):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)

"""Tiny models of the real Transformers classes, with random weights, and batches of random tokens."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cats import Thresholds, find_gated_mlps
from cats.core.thresholds import fingerprint

VOCABULARY = 128
_SIZES = dict(
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,  # activations of order one, as trained models have
)
_ATTENTION = dict(head_dim=8, sliding_window=16)
FAMILIES = {
    "llama": dict(model_type="llama"),
    "mistral": dict(model_type="mistral", **_ATTENTION),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=8),
    "gemma2": dict(model_type="gemma2", query_pre_attn_scalar=8, **_ATTENTION),
    "gemma3": dict(model_type="gemma3_text", query_pre_attn_scalar=8, **_ATTENTION),
    "phi3": dict(model_type="phi3"),
}


def toy(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """A model of three layers, d = 32, m = 80, in evaluation mode."""
    config = AutoConfig.for_model(**{**_SIZES, **FAMILIES[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens(rows: int = 4, length: int = 24, *, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(count: int = 3, *, padded: bool = True, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Batches of four rows; with `padded`, the second row of each ends a third before the others."""
    result = []
    for number in range(count):
        ids = tokens(seed=seed + number)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, 16:] = 0
            ids[1, 16:] = 0
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


def constant_thresholds(model: PreTrainedModel, most: float = 1.0) -> Thresholds:
    """Thresholds s * most at gate sparsity s in every layer of `model`, without any calibration."""
    mlps = find_gated_mlps(model)
    return Thresholds(
        model={
            "id": "toy",
            "intermediate_sizes": [mlp.intermediate_size for mlp in mlps],
            "gate_signs": fingerprint(mlps),
        },
        activation=mlps[0].activation,
        criterion="constant",
        corpus={"name": "none"},
        tokens=0,
        policy={},
        grid=torch.tensor([0.0, 1.0]),
        values=torch.tensor([[0.0, most]] * len(mlps)),
        grid_error=1.0,
    )


class Characters:
    """A tokenizer of one token a character, with or without a BOS token."""

    pad_token_id, eos_token_id = 0, 2

    def __init__(self, bos: bool = False):
        self.adds_bos = bos
        self.bos_token_id = 1 if bos else None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [3 + ord(character) % (VOCABULARY - 3) for character in text]
        prefix = [1] if self.adds_bos and add_special_tokens else []
        return type("Encoding", (), {"input_ids": prefix + ids})()

    def decode(self, ids):
        return "<s>" * len(ids)

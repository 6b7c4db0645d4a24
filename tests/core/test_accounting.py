"""Sparsity, bytes and bounds, against the arithmetic of the shapes and against published conversions."""

import pytest
from toys import FAMILIES, constant_thresholds, toy
from transformers import AutoConfig, AutoModelForSequenceClassification

from cats import CatsError, sparsify
from cats.core.accounting import account
from cats.models import load as models

# Computed from the models' shapes in a survey of the methods that followed the paper: gate sparsity k
# against the share of all linear weights of the blocks, and the bound on decoding with the output head.
MODEL_LEVEL = {
    "llama-2-7b": (22.3, 31.2, 40.1),
    "llama-3-8b": (26.9, 37.7, 48.5),
    "mistral-7b": (26.9, 37.7, 48.5),
    "qwen2.5-7b": (29.1, 40.8, 52.4),
}
BOUND = {
    "llama-2-7b": (1.28, 1.44, 1.65),
    "llama-3-8b": (1.33, 1.54, 1.82),
    "mistral-7b": (1.36, 1.59, 1.91),
    "qwen2.5-7b": (1.37, 1.60, 1.94),
}
NEEDED = {  # gate sparsity for 25, 40 and 50 % model-level; None: out of reach
    "llama-2-7b": (0.56, 0.90, None),
    "llama-3-8b": (0.46, 0.74, 0.93),
    "mistral-7b": (0.46, 0.74, 0.93),
    "qwen2.5-7b": (0.43, 0.69, 0.86),
}


@pytest.mark.parametrize("name", MODEL_LEVEL)
def test_published_conversions(name):
    shape = account(models.config(f"random:{name}"))
    for k, level, bound in zip((0.5, 0.7, 0.9), MODEL_LEVEL[name], BOUND[name], strict=True):
        assert 100 * shape.model_sparsity(k) == pytest.approx(level, abs=0.051)
        assert shape.speedup_bound(k) == pytest.approx(bound, abs=0.0051)
    for level, needed in zip((0.25, 0.40, 0.50), NEEDED[name], strict=True):
        if needed is None:
            with pytest.raises(CatsError, match=r"cannot reach a model-level sparsity of 50\.0%"):
                shape.gate_sparsity(level)
        else:
            assert shape.gate_sparsity(level) == pytest.approx(needed, abs=0.0051)
            assert shape.model_sparsity(shape.gate_sparsity(level)) == pytest.approx(level)


# The same in the paper's fact sheet, for the models of its figures.
@pytest.mark.parametrize(
    ("name", "share", "most"),
    [
        ("llama-2-7b", 0.655, 0.4456),
        ("mistral-7b", 0.793, 0.5385),
        ("llama-2-13b", 0.661, 0.4463),
        ("llama-3-8b", 0.751, 0.5385),
        ("llama-2-70b", None, 0.5490),
    ],
)
def test_shares_of_published_models(name, share, most):
    shape = account(models.config(f"random:{name}"))
    assert shape.max_model_sparsity == pytest.approx(most, abs=5.1e-5)
    if share:
        assert shape.mlp_share == pytest.approx(share, abs=5.1e-4)


def test_llama_2_7b_by_hand():
    shape = account(models.config("random:llama-2-7b"))
    d, m, layers, vocabulary = 4096, 11008, 32, 32000
    assert shape.mlp_weights == 3 * d * m * layers and shape.attention_weights == 4 * d * d * layers
    assert shape.head_weights == d * vocabulary
    assert shape.bytes_per_token() == 2 * (layers * (3 * d * m + 4 * d * d) + d * vocabulary)
    assert shape.bytes_per_token(0.5) == shape.bytes_per_token() - 2 * layers * d * m
    assert shape.mlp_speedup_bound(0.5) == pytest.approx(1.5) and shape.mlp_speedup_bound(1) == pytest.approx(
        3
    )
    assert account(models.config("random:llama-2-7b"), lm_head=False).head_weights == 0


def test_grouped_queries_count_as_they_are_built():
    shape = account(models.config("random:mistral-7b"))
    d, head, groups = 4096, 128, 8
    assert shape.attention_weights == 32 * (2 * d * d + 2 * d * head * groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_configuration_agree(family):
    model = toy(family)
    shape = account(model.config)
    assert shape == account(model)
    assert (shape.hidden_size, shape.intermediate_size, shape.layers) == (32, 80, 3)
    assert shape.mlp_weights == 3 * 3 * 32 * 80 and shape.skippable_weights == 2 * 3 * 32 * 80
    blocks = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.ndim == 2)
    assert shape.block_weights == blocks
    sparsify(model, constant_thresholds(model), 0.5)
    assert account(model) == shape


def test_adapters_are_not_counted_as_weights():
    from peft import LoraConfig, get_peft_model

    shape = account(toy())
    adapted = get_peft_model(toy(), LoraConfig(r=4, target_modules=["q_proj", "gate_proj"]))
    assert account(adapted).mlp_weights == shape.mlp_weights


def test_wrong_input():
    shape = account(toy())
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(CatsError, match="outside"):
            shape.model_sparsity(value)
        with pytest.raises(CatsError, match="outside"):
            shape.speedup_bound(value)
    with pytest.raises(CatsError, match="mixture of experts"):
        account(AutoConfig.for_model("mixtral", num_local_experts=2, hidden_size=64, intermediate_size=64))
    with pytest.raises(CatsError, match="no gated MLP"):
        account(AutoConfig.for_model("gpt2"))
    with pytest.raises(CatsError, match="has no causal language model"):
        account(AutoConfig.for_model("vit"))


def test_a_model_without_an_output_head():
    model = toy()
    headless = account(model.model)
    assert headless == account(model, lm_head=False) and headless.head_weights == 0
    assert account(AutoModelForSequenceClassification.from_config(model.config)) == headless

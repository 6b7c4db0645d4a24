"""Gated MLPs are found by what they compute; everything else is refused with a sentence that names it."""

import pytest
import torch
from torch import nn
from toys import FAMILIES, constant_thresholds, toy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cats import CatsError, find_gated_mlps, sparsify
from cats.core.structure import layout_of

SMALL = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    mlps = find_gated_mlps(toy(family))
    assert [mlp.layer for mlp in mlps] == [0, 1, 2]
    assert [mlp.name for mlp in mlps] == [f"model.layers.{layer}.mlp" for layer in range(3)]
    assert {(mlp.hidden_size, mlp.intermediate_size) for mlp in mlps} == {(32, 80)}
    assert {mlp.activation for mlp in mlps} == {"gelu_tanh" if family.startswith("gemma") else "silu"}
    assert {mlp.fused for mlp in mlps} == {family == "phi3"}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("granite", {}),
        ("olmo2", {}),
        ("glm", dict(head_dim=8, num_key_value_heads=2, pad_token_id=0)),
        ("cohere", {}),
        ("stablelm", dict(num_key_value_heads=4)),
        ("smollm3", dict(num_key_value_heads=2, pad_token_id=0)),
        ("helium", dict(head_dim=8, num_key_value_heads=2)),
        ("exaone4", dict(num_key_value_heads=4)),
    ],
)
def test_families_not_named_anywhere_in_the_code(model_type, more):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL, **more)).eval()
    ids = torch.arange(1, 9)[None]
    dense = model(ids).logits
    sparsify(model, constant_thresholds(model), 0.0)
    torch.testing.assert_close(model(ids).logits, dense)


def test_sparse_model_is_found_again():
    model = toy("phi3")
    names = [mlp.name for mlp in find_gated_mlps(model)]
    sparsify(model, constant_thresholds(model), 0.5)
    found = find_gated_mlps(model)
    assert [mlp.name for mlp in found] == names
    assert all(mlp.fused and mlp.intermediate_size == 80 for mlp in found)


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("mixtral", dict(num_local_experts=4, num_key_value_heads=2)),
        ("qwen2_moe", dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
        ("qwen3_moe", dict(num_experts=4, moe_intermediate_size=16, num_key_value_heads=2)),
        ("olmoe", dict(num_experts=4)),
    ],
)
def test_experts_are_refused(model_type, more):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **more}))
    with pytest.raises(CatsError, match=r"is a mixture of experts \(\w+ at model\.layers\.0\.mlp.*experts"):
        find_gated_mlps(model)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=64), "2 GPT2MLP"),
        (dict(model_type="gpt_neox", **SMALL), "2 GPTNeoXMLP"),
        (
            dict(model_type="opt", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, **SMALL),
            "2 OPTDecoderLayer",
        ),
        (dict(model_type="phi", **SMALL), "2 PhiMLP"),
    ],
)
def test_models_without_gates_are_refused(config, found):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with pytest.raises(CatsError, match=rf"has no gated MLP .*: found .*{found}"):
        find_gated_mlps(model)


def test_text_tower_of_a_multimodal_model():
    text = dict(model_type="llama", **SMALL)
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, image_size=16, patch_size=8,
    )  # fmt: skip
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision)
    mlps = find_gated_mlps(AutoModel.from_config(config))
    assert [mlp.name for mlp in mlps] == ["language_model.layers.0.mlp", "language_model.layers.1.mlp"]


class MLP(nn.Module):
    """What tests vary: a plain gated MLP."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def test_names_and_order_do_not_matter():
    class Other(MLP):
        def forward(self, x):
            return self.down(self.up(x) * nn.functional.gelu(self.gate(x), approximate="tanh"))

    assert layout_of(MLP())[:3] == ("gate", "up", "down")
    layout = layout_of(Other())
    assert layout[:3] == ("gate", "up", "down") and layout.activation == "gelu_tanh"


def test_gate_behind_up_in_a_fused_projection():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_gate, self.down = nn.Linear(8, 48), nn.Linear(24, 8)

        def forward(self, x):
            up, gate = self.up_gate(x).chunk(2, dim=-1)
            return self.down(up * nn.functional.silu(gate))

    layout = layout_of(Fused())
    assert layout.fused and layout.gate_half == 1


def test_attention_with_the_shapes_of_a_fused_mlp_is_passed_over():
    attention = toy("phi3", num_attention_heads=4, num_key_value_heads=2).model.layers[0].self_attn
    assert attention.qkv_proj.out_features == 2 * attention.o_proj.in_features
    assert layout_of(attention) is None


class Holder(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp


def _scaled(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x)) * 2.0


def _both_activated(self, x):
    return self.down(self.act(self.gate(x)) * self.act(self.up(x)))


def _clamped(self, x):
    return self.down(self.act(self.gate(x).clamp(max=7.0)) * self.up(x))


def _plus_one(self, x):
    return self.down(self.act(self.gate(x)) * (self.up(x) + 1))


def _residual(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x)) + x


def _same_twice(self, x):
    return self.down(self.act(self.gate(x)) * self.gate(x))


def _branching(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x)) if x.sum() > 0 else x


def _tanh(self, x):
    return self.down(torch.tanh(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    "forward", [_scaled, _both_activated, _clamped, _plus_one, _residual, _same_twice, _branching, _tanh]
)
def test_lookalikes_are_refused(forward):
    lookalike = type("Lookalike", (MLP,), {"forward": forward})
    with pytest.raises(
        CatsError, match=r"Lookalike at mlp has the parts of a gated MLP, but its|the activation"
    ):
        find_gated_mlps(Holder(lookalike()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization_leaves_no_gated_mlp():
    model = torch.ao.quantization.quantize_dynamic(toy(), {nn.Linear})
    with pytest.raises(CatsError, match=r"has no gated MLP .*: found no linear layers"):
        find_gated_mlps(model)


def test_replaced_forward_is_refused():
    mlp = MLP()
    mlp.forward = lambda x: x
    with pytest.raises(CatsError, match="replaced by another library"):
        find_gated_mlps(Holder(mlp))


def test_a_compiled_module_is_refused():
    model = toy()
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    with pytest.raises(CatsError, match=r"layers\.1\.mlp was compiled by itself and would stay dense"):
        find_gated_mlps(model)
    model = torch.compile(toy(), backend="eager")
    assert len(find_gated_mlps(model)) == 3


def test_quantized_weights_are_refused():
    mlp = MLP()
    mlp.gate.weight = nn.Parameter(torch.zeros(24, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CatsError, match=r"gate is quantized to torch.int8"):
        find_gated_mlps(Holder(mlp))

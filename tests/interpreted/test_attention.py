"""The attention of the decoding loop: equal to its reference, installed in models and taken out again."""

import copy

import pytest
import torch
from cats_kernels import decode_attention as fused
from decoding_toys import DEVICE, by_transformers, prompt, toy

from cats.decoding import attention
from cats.decoding import graph as decoding

pytestmark = pytest.mark.usefixtures("fused_attention_everywhere")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))  # the interpreter cannot multiply bfloat16
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "now"), [(1, 4, 2, 40, 0), (1, 2, 2, 70, 69), (2, 6, 1, 33, 17)]
)
def test_attention_equals_its_reference(batch, heads, kv_heads, length, now, masked, dtype):
    dim = 32
    generator = torch.Generator().manual_seed(now)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    qkv = normal(batch, (heads + 2 * kv_heads) * dim)
    angle = torch.rand(1, dim // 2, generator=generator).repeat(1, 2)
    cos, sin = angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)
    keys, values = (normal(batch, kv_heads, length, dim) for _ in range(2))
    mask = None
    if masked:
        mask = torch.rand(batch, length, generator=generator).to(DEVICE) < 0.6
        mask[:, now] = True
    arrivals = fused.arrival_counters(batch, kv_heads, DEVICE)
    ours, theirs = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    position = torch.tensor(now, device=DEVICE)
    for _ in range(2):  # the second call finds the counters as the first one did
        y = fused.decode_attention(qkv, cos, sin, *ours, position, mask, arrivals, dim**-0.5)
        expected = fused.reference(qkv, cos, sin, *theirs, position, mask, dim**-0.5)
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    assert not arrivals.any()


def test_installing_changes_neither_weights_nor_results_and_can_be_undone():
    model = toy("qwen2")
    ids = prompt()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(ids).logits
        attention.install(model)
        torch.testing.assert_close(model(ids).logits, logits)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        attention.remove(model)
        assert type(model.model.layers[0].self_attn).__name__ == "Qwen2Attention"
        assert torch.equal(model(ids).logits, logits)


def load_assigning(model, weights):
    model.load_state_dict(weights, assign=True)


def load_after_casts(model, weights):
    model.double().float().load_state_dict(weights)


def load_half_of_it(model, weights):
    del weights["model.layers.1.self_attn.k_proj.weight"]
    model.load_state_dict(weights, assign=True, strict=False)


@pytest.mark.parametrize(
    ("load", "copied"),
    [(load_assigning, False), (load_half_of_it, False), (load_after_casts, False), (load_after_casts, True)],
)
def test_weights_that_are_loaded_after_installing_are_those_that_decode(load, copied, calls):
    model, ids = toy("qwen2"), prompt()
    attention.install(model)
    if copied:
        model = copy.deepcopy(model)
    other = toy("qwen2", seed=5)
    for name, parameter in other.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    load(model, other.state_dict())
    same = copy.deepcopy(model)
    attention.remove(same)
    expected = by_transformers(same, ids, 3)
    static = by_transformers(model, ids, 3, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)
    assert bool(calls) == (load is load_after_casts and not copied), "casts alone leave them fused"
    calls.clear()
    tokens = by_transformers(model, ids, 3, custom_generate=decoding.greedy)
    assert torch.equal(tokens, expected) and calls
    first = model._cats_decoder
    by_transformers(model, ids, 3, custom_generate=decoding.greedy)
    assert model._cats_decoder is first, "fused again once, not at every call"
    attention.remove(model)
    assert torch.equal(by_transformers(model, ids, 3), expected)


def test_adapters_and_hooks_on_installed_modules_take_part(calls):
    peft = pytest.importorskip("peft")
    model, ids = toy(), prompt()
    attention.install(model)
    dense = by_transformers(model, ids, 6)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    given = dict(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = adapted.generate(**given)
    assert not torch.equal(expected, dense)
    assert torch.equal(adapted.generate(**given, custom_generate=decoding.greedy), expected) and not calls
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(**given, custom_generate=decoding.greedy), expected) and calls
    calls.clear()
    for layer in merged.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, inputs, out: -out)
    expected = merged.generate(**given)
    tokens = decoding.Decoder(merged, 32, options=None).generate(ids, 6).tokens
    assert torch.equal(tokens, expected) and not calls


def test_an_installed_step_compiles_whole(calls):
    model, ids = toy("qwen2"), prompt()
    attention.install(model)
    expected = decoding.Decoder(model, 32, options=None).generate(ids, 4).tokens
    decoder = decoding.Decoder(model, 32, options=None)
    decoder._step = torch.compile(decoder._decode_one, fullgraph=True, dynamic=False, backend="eager")
    calls.clear()
    assert torch.equal(decoder.generate(ids, 4).tokens, expected) and calls


def test_an_installed_model_is_saved_and_copied_whole(tmp_path):
    model = toy("qwen2")
    attention.install(model)
    by_transformers(model, prompt(), 3, custom_generate=decoding.greedy)
    torch.save(model, tmp_path / "model.pt")  # pickle looks for classes by name
    kind = type(model.model.layers[0].self_attn)
    assert getattr(attention, kind.__name__) is kind and kind.__name__ == "OneTokenQwen2Attention"
    assert copy.deepcopy(model)._cats_decoder is None

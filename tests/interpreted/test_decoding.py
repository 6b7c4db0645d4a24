"""The decoding loop: the tokens of Transformers, what it refuses, and when it makes a new decoder."""

import math

import pytest
import torch
from cats_kernels import crossover
from decoding_toys import DEVICE, by_transformers, prompt, toy
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from cats import CatsError
from cats.calibration import calibrate as calibration
from cats.core.sparsify import restore, set_sparsity, sparsify
from cats.decoding import attention
from cats.decoding import graph as decoding

pytestmark = pytest.mark.usefixtures("fused_attention_everywhere")


def sparse(model):
    ids = prompt(2, 24)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return sparsify(model, calibration.calibrate(model, [batch], progress=False), 0.5)


@pytest.mark.parametrize(
    ("kind", "make_sparse"), [("llama", False), ("llama", True), ("mistral", True), ("qwen2", False)]
)
def test_the_loop_decodes_what_transformers_decodes(kind, make_sparse, calls):
    model = toy(kind)
    if make_sparse:
        sparse(model)
    ids, new = prompt(), 6
    expected = by_transformers(model, ids, new)
    assert attention.install(model) == 2 and not calls
    assert torch.is_grad_enabled(), "callers do not have to know that gradients must be off"
    generation = decoding.Decoder(model, 32, options=None).generate(ids, new)
    assert torch.equal(generation.tokens, expected)
    assert len(calls) >= 2 and not any(calls), "each step must take the fused attention, without gradients"
    if DEVICE == "cpu":
        assert len(calls) == 2 * (new - 1)
    assert generation.new_tokens == new and generation.tokens_per_s > 0


def test_generate_with_the_loop_keeps_its_decoder_while_it_fits():
    model = sparse(toy())
    attention.install(model)
    ids = prompt()
    expected = by_transformers(model, ids, 6)
    assert torch.equal(by_transformers(model, ids, 6, custom_generate=decoding.greedy), expected)
    first = model._cats_decoder
    by_transformers(model, ids, 4, custom_generate=decoding.greedy)
    assert model._cats_decoder is first
    restore(model)
    dense = by_transformers(model, ids, 6)
    assert torch.equal(by_transformers(model, ids, 6, custom_generate=decoding.greedy), dense)
    assert model._cats_decoder is not first, "a captured step of other modules must not be replayed"


def test_rows_end_at_their_own_end_of_sequence():
    model = toy()
    attention.install(model, batch=2)
    ids = prompt(2)
    free = by_transformers(model, ids, 8)
    eos = int(free[0, 9 + 2])
    expected = by_transformers(model, ids, 8, eos_token_id=eos, pad_token_id=eos)
    got = by_transformers(model, ids, 8, eos_token_id=eos, pad_token_id=eos, custom_generate=decoding.greedy)
    assert torch.equal(got, expected)


def test_what_the_loop_cannot_do_is_said():
    model, ids = toy(), prompt()
    for options in ({"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.3}):
        with pytest.raises(CatsError, match="does not do"):
            by_transformers(model, ids, 4, custom_generate=decoding.greedy, **options)
    with pytest.raises(CatsError, match="stopping criteria"):
        by_transformers(model, ids, 4, custom_generate=decoding.greedy, max_time=9.0)
    padded = torch.ones_like(ids)
    padded[:, 0] = 0
    with pytest.raises(CatsError, match="padded prompts"):
        model.generate(ids, attention_mask=padded, max_new_tokens=2, custom_generate=decoding.greedy)
    with pytest.raises(CatsError, match="model takes 64"):
        decoding.Decoder(model, 65)
    with pytest.raises(CatsError, match="make a larger one"):
        decoding.Decoder(model, 12).generate(ids, 8)


def test_inputs_that_the_loop_would_drop_are_refused():
    model, ids = toy(), prompt()

    def decoded(**inputs):
        return by_transformers(model, ids, 4, custom_generate=decoding.greedy, **inputs)

    expected = by_transformers(model, ids, 4)
    count = torch.arange(9, device=DEVICE)[None]
    assert torch.equal(decoded(position_ids=count), expected)
    with pytest.raises(CatsError, match="positions other than 0, 1, 2"):
        decoded(position_ids=count + 3)
    with pytest.raises(CatsError, match=r"other inputs than tokens \(inputs_embeds\)"):
        decoded(inputs_embeds=model.get_input_embeddings()(ids))
    embeds = {"inputs_embeds": model.get_input_embeddings()(ids)}
    with pytest.raises(CatsError, match="inputs_embeds"):
        model.generate(**embeds, max_new_tokens=2, do_sample=False, custom_generate=decoding.greedy)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(CatsError, match="caches that hold tokens"):
        decoded(past_key_values=cache)
    config = GenerationConfig(do_sample=False, num_beams=1, max_length=12)
    config._eos_token_tensor = None
    given = dict(logits_processor=[], stopping_criteria=[], generation_config=config)
    with pytest.raises(CatsError, match="empty prompts"):
        decoding.greedy(model, ids[:, :0], **given)
    with pytest.raises(CatsError, match=r"\(pixel_values\)"):
        decoding.greedy(model, ids, pixel_values=torch.zeros(1, 3, 8, 8), **given)
    given |= {"token_type_ids": torch.zeros_like(ids), "mm_encoder_outputs": {}}  # a text without images
    assert torch.equal(decoding.greedy(model, ids, **given), expected[:, :12])


@pytest.mark.parametrize("kind", ("PrefixTuningConfig", "PromptTuningConfig", "LoraConfig"))
def test_soft_prompts_are_refused_and_adapters_are_not(kind):
    peft = pytest.importorskip("peft")
    more = {"init_lora_weights": False} if kind == "LoraConfig" else {"num_virtual_tokens": 4}
    torch.manual_seed(1)
    model = peft.get_peft_model(toy(), getattr(peft, kind)(task_type="CAUSAL_LM", **more)).eval()
    given = dict(input_ids=prompt(), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(**given)
    if kind == "LoraConfig":
        assert torch.equal(model.generate(**given, custom_generate=decoding.greedy), expected)
        return
    with pytest.raises(CatsError, match="soft prompts of PEFT"):
        model.generate(**given, custom_generate=decoding.greedy)
    base = model.base_model  # by itself it decodes as before
    assert base.generate(**given, custom_generate=decoding.greedy).shape == (1, 13)


@pytest.mark.parametrize(
    ("model_type", "more", "what"),
    [
        ("recurrent_gemma", dict(lru_width=64, num_hidden_layers=3), "linear_attention|a recurrent state"),
        ("lfm2", dict(layer_types=["conv", "full_attention"]), "conv"),
        ("qwen3_5_text", dict(num_hidden_layers=4), "linear_attention"),
        ("minimax", dict(num_local_experts=2), "linear_attention"),
        ("rwkv", dict(attention_hidden_size=64), "a recurrent state"),
        ("llama4_text", dict(attention_chunk_size=8, moe_layers=[], intermediate_size_mlp=64), None),
        ("gemma2", dict(sliding_window=4), None),
    ],
)
def test_models_that_keep_more_than_keys_and_values_are_refused(model_type, more, what):
    small = dict(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**small, **more}))
    model, ids = model.eval().to(DEVICE), prompt()
    if what is None:
        tokens = decoding.Decoder(model, 32, options=None).generate(ids, 8).tokens
        assert torch.equal(tokens, by_transformers(model, ids, 8))
        return
    with pytest.raises(CatsError, match=rf"keep more than keys and values \({what}\)"):
        by_transformers(model, ids, 4, custom_generate=decoding.greedy)


@pytest.mark.parametrize("implementation", ("flex_attention", "flash_attention_2"))
def test_attention_that_needs_masks_of_its_own_is_refused(implementation):
    model, ids = toy(), prompt()
    model.config._attn_implementation_internal = implementation  # set so, as flash attention is not installed
    with pytest.raises(CatsError, match=rf"does not do {implementation}: call .*'sdpa'"):
        decoding.Decoder(model, 32)
    model.set_attn_implementation("sdpa")
    assert decoding.Decoder(model, 32, options=None).generate(ids, 2).new_tokens == 2


def test_what_a_captured_step_cannot_take_up_makes_a_new_decoder(monkeypatch):
    # a layer as small as the toy's stays dense on a GPU
    monkeypatch.setattr(crossover, "CROSSOVER", {math.inf: crossover.CROSSOVER[8191]})
    model = toy()
    thresholds = calibration.calibrate(model, [{"input_ids": prompt(2, 24)}], progress=False)
    sparsify(model, thresholds, 0.0)
    mlp, seen = model.model.layers[0].mlp, []

    def renewed(batch=1):
        before = len(seen)
        seen.append(decoding.decoder_for(model, 20, batch))
        return before > 0 and seen[-1] is not seen[-2]

    assert not renewed() and not renewed()
    set_sparsity(model, thresholds, 0.7)
    assert renewed(), "at sparsity 0 the captured step is dense"
    set_sparsity(model, thresholds, 0.5)
    assert not renewed(), "thresholds are read by every step"
    for name in ("observer", "combine"):
        for value in (print, repr, None):
            setattr(mlp, name, value)
            assert renewed() and not renewed()
    handle = mlp.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert renewed()
    handle.remove()
    assert renewed()
    model.train()
    assert renewed()
    model.eval()
    assert renewed() and renewed(batch=8)
    set_sparsity(model, thresholds, 0.9)
    assert renewed(batch=8), "at 0.5 eight rows took the dense branch"


def test_switched_adapters_make_a_new_decoder():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(toy(), peft.LoraConfig(task_type="CAUSAL_LM"))
    base = adapted.get_base_model()
    first = decoding.decoder_for(base, 20)
    with adapted.disable_adapter():
        assert decoding.decoder_for(base, 20) is not first
    again = decoding.decoder_for(base, 20)
    adapted.merge_adapter()
    assert decoding.decoder_for(base, 20) is not again

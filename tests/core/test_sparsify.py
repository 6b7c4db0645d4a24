"""Sparse models against dense ones: the same at sparsity 0, reversible, checked before anything changes."""

import copy

import numpy as np
import pytest
import torch
from toys import FAMILIES, batches, constant_thresholds, tokens, toy
from transformers import AutoModelForCausalLM

from cats import (
    CatsError,
    SparsityMeter,
    calibrate,
    cats_mlps,
    find_gated_mlps,
    restore,
    set_sparsity,
    sparsify,
)
from cats.core.activation import CatsMLP

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_zero_gives_identical_logits(family, dtype):
    model = toy(family, dtype=dtype)
    batch = batches(1)[0]
    with torch.no_grad():
        dense = model(**batch).logits
        for mlp in find_gated_mlps(model):  # a matrix product may sum in another order for other strides
            weight = mlp.module.down_proj.weight
            weight.data = weight.data.t().contiguous().t()
        same_strides = model(**batch).logits
        sparsify(model, constant_thresholds(model), 0.0)
        sparse = model(**batch).logits
    assert len(cats_mlps(model)) == 3
    assert torch.equal(sparse, same_strides)
    if dtype == torch.float32:
        assert torch.equal(sparse, dense)
    torch.testing.assert_close(sparse, dense, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_back_the_model_to_the_bit(family):
    model = toy(family)
    ids = tokens()
    names = [(name, type(module)) for name, module in model.named_modules()]
    before = {name: (p, p.clone(), p.stride()) for name, p in model.named_parameters()}
    dense = model(ids).logits
    sparsify(model, constant_thresholds(model), 0.5)
    assert not torch.equal(model(ids).logits, dense)
    restore(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, value, stride) in before.items():
        assert after[name] is parameter and after[name].stride() == stride
        assert torch.equal(after[name], value)
    assert torch.equal(model(ids).logits, dense)
    assert getattr(model.config, "quantization_config", None) is None


def test_down_projection_is_stored_once_by_columns():
    model = toy()
    count = sum(p.numel() for p in model.parameters())
    keys = list(model.state_dict())
    sparsify(model, constant_thresholds(model), 0.5)
    assert sum(p.numel() for p in model.parameters()) == count
    assert [key for key in model.state_dict() if not key.endswith(".threshold")] == keys
    for module in cats_mlps(model):
        assert module.w_down_t.is_contiguous()
        assert module.w_down_t.data_ptr() == module.down_proj.weight.data_ptr()


def test_a_shared_down_projection_stays_by_rows(llama, tmp_path):
    """Transformers saves shared weights that the model declares, by rows alone."""
    first, last = (llama.model.layers[number].mlp.down_proj for number in (0, 2))
    last.weight = first.weight
    llama._tied_weights_keys = llama.all_tied_weights_keys = {
        "model.layers.2.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight"
    }
    sparsify(llama, constant_thresholds(llama), 0.5)
    assert [module.w_down_t.is_contiguous() for module in cats_mlps(llama)] == [False, True, False]
    llama.save_pretrained(tmp_path)


def test_sparsity_by_layer_and_anew(llama):
    thresholds = calibrate(llama, batches(), progress=False)
    wanted = [0.1, 0.5, 0.9]
    sparsify(llama, thresholds, wanted)
    assert [float(m.threshold) for m in cats_mlps(llama)] == thresholds.at(wanted).tolist()
    first = cats_mlps(llama)[0].threshold
    set_sparsity(llama, thresholds, 0.7)
    assert cats_mlps(llama)[0].threshold is first, "written in place: a captured graph sees it"
    assert [float(m.threshold) for m in cats_mlps(llama)] == thresholds.at(0.7).tolist()


def test_threshold_per_neuron(llama):
    thresholds = calibrate(llama, batches(), per="neuron", progress=False)
    sparsify(llama, thresholds, 0.5)
    for module, t in zip(cats_mlps(llama), thresholds.at(0.5), strict=True):
        assert module.threshold.shape == (80,) and torch.equal(module.threshold, t)
    with SparsityMeter(llama) as meter:
        for batch in batches():
            llama(**batch)
    assert abs(meter.overall - 0.5) < 0.02


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_not_metered_whatever_the_cache(family, attention):
    model = toy(family)
    model.set_attn_implementation(attention)
    sparsify(model, calibrate(model, batches(), progress=False), 0.5)
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[1, :6] = mask[2, :11] = 0
    options = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    seen = []
    for cache in ("dynamic", "static"):
        with SparsityMeter(model) as meter:
            model.generate(tokens(3, 20) * mask, cache_implementation=cache, **options)
        seen.append((meter.tokens, round(meter.overall, 3)))
    assert seen[0] == seen[1] and meter.tokens == int(mask.sum()) + 3 * 5


def test_a_mask_that_hides_which_tokens_are_padding_is_refused(llama):
    sparsify(llama, constant_thresholds(llama), 0.5)
    with SparsityMeter(llama), pytest.raises(CatsError, match="does not say which tokens are padding"):
        llama(tokens(1, 4), attention_mask=torch.ones(1, 4, 3, dtype=torch.bool)[None])


def test_everything_is_dropped_near_one():
    model = toy()
    sparsify(model, constant_thresholds(model, most=1e6), 0.999)
    module = cats_mlps(model)[0]
    assert module(torch.randn(1, 3, 32)).abs().max() == 0


@pytest.mark.parametrize(
    "sparsity",
    [0.5, torch.tensor(0.5), np.float32(0.5), [np.float64(0.5)] * 3, np.full(3, 0.5), torch.full((3,), 0.5)],
)
def test_numbers_of_other_libraries_are_saved_too(llama, tmp_path, sparsity):
    sparsify(llama, constant_thresholds(llama), sparsity)
    llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [module.sparsity for module in cats_mlps(again)] == [0.5] * 3


@pytest.mark.parametrize(
    ("sparsity", "reason"),
    [
        (1.0, r"Sparsity 1\.0 is outside \[0, 1\)"),
        (1.2, r"Sparsity 1\.2 is outside"),
        (-0.1, "outside"),
        (float("nan"), "outside"),
        (True, "outside"),
        ("0.5", "outside"),
        (None, "outside"),
        ([0.5, 0.5], "2 sparsities were given for 3 layers"),
        ([0.5, 0.5, 1.0], "outside"),
        ([], "0 sparsities"),
    ],
)
def test_wrong_sparsity_changes_nothing(llama, sparsity, reason):
    thresholds = constant_thresholds(llama)
    with pytest.raises(CatsError, match=reason):
        sparsify(llama, thresholds, sparsity)
    assert not any(isinstance(module, CatsMLP) for module in llama.modules())


def test_wrong_prefill_and_foreign_models_change_nothing(llama):
    thresholds = constant_thresholds(llama)
    with pytest.raises(CatsError, match="Unknown prefill 'sparse': use one of masked, dense"):
        sparsify(llama, thresholds, 0.5, prefill="sparse")
    for other, reason in [
        (toy(seed=7), "calibrated on other weights"),
        (toy(num_hidden_layers=2), "for 3 layers .* the model has 2"),
        (toy(intermediate_size=96), "for intermediate size 80 in layer 0 .* the model has 96"),
        (toy(hidden_act="gelu"), "for silu gates .* the model has gelu"),
    ]:
        with pytest.raises(CatsError, match=reason):
            sparsify(other, thresholds, 0.5)
        assert not any(isinstance(module, CatsMLP) for module in other.modules())


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = toy()
    with pytest.raises(CatsError, match=r"weights of model\.layers\.0\.mlp are not in memory"):
        sparsify(model, constant_thresholds(toy()), 0.5)


def test_dense_model_has_nothing_to_meter_or_restore(llama):
    with pytest.raises(CatsError, match=r"is not sparsified: call cats.sparsify"):
        SparsityMeter(llama)
    with pytest.raises(CatsError, match="is not sparsified"):
        set_sparsity(llama, constant_thresholds(llama), 0.5)
    restore(llama)


def test_models_of_one_configuration_object_do_not_share_it(llama, tmp_path):
    twin = type(llama)(llama.config)
    sparsify(llama, constant_thresholds(llama), 0.5)
    assert not hasattr(twin.config, "quantization_config")
    assert llama.model.config is llama.config and llama.model.layers[0].self_attn.config is llama.config
    llama.save_pretrained(tmp_path)
    assert len(cats_mlps(AutoModelForCausalLM.from_pretrained(tmp_path))) == 3


def test_deep_copies_do_not_share_thresholds(llama):
    thresholds = constant_thresholds(llama)
    sparsify(llama, thresholds, 0.5)
    twin = copy.deepcopy(llama)
    set_sparsity(llama, thresholds, 0.2)
    assert [float(m.threshold) for m in cats_mlps(twin)] == [0.5] * 3
    restore(twin)
    assert torch.equal(twin(tokens()).logits, toy()(tokens()).logits)


def test_training_mode_is_kept(llama):
    llama.train()
    sparsify(llama, constant_thresholds(llama), 0.5)
    assert all(module.training for module in llama.modules())
    llama.eval()
    restore(llama)
    assert not any(module.training for module in llama.modules())


def test_sparsified_in_inference_mode_trains_later(llama):
    thresholds = calibrate(llama, batches(), progress=False)
    with torch.inference_mode():
        sparsify(llama, thresholds, 0.5)
    set_sparsity(llama, thresholds, 0.7)
    llama(tokens(), labels=tokens()).loss.backward()
    llama.zero_grad()
    with torch.inference_mode():
        restore(llama)
        model = toy()
        model(tokens())
        set_sparsity(sparsify(model, thresholds, 0.5), thresholds, 0.7)
        assert torch.isfinite(model(tokens()).logits).all()
    llama(tokens(), labels=tokens()).loss.backward()


def test_compiled_without_graph_breaks(llama):
    sparsify(llama, constant_thresholds(llama), 0.5)
    with torch.no_grad():
        expected = llama(tokens(), use_cache=False).logits
        compiled = torch.compile(llama, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)

"""CATS as a quantization method of Transformers: load, save, load again elsewhere, generate, adapt."""

import json
import subprocess
import sys

import pytest
import torch
from toys import FAMILIES, batches, constant_thresholds, tokens, toy
from transformers import AutoConfig, AutoModelForCausalLM

from cats import CatsConfig, CatsError, SparsityMeter, calibrate, cats_mlps, restore, set_sparsity, sparsify

PLAIN_LOAD = """
import sys, torch, cats
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(torch.load(sys.argv[2], weights_only=True)).logits
torch.save({"logits": logits, "mlp": type(model.model.layers[0].mlp).__name__}, sys.argv[3])
"""


@pytest.fixture
def saved(tmp_path):
    """A dense toy model and its thresholds file, on disk."""
    model = toy()
    model.save_pretrained(tmp_path / "dense")
    calibrate(model, batches(), progress=False).save(tmp_path / "thresholds.json")
    return tmp_path


def load_sparse(folder, sparsity=0.5, **options):
    config = CatsConfig(sparsity=sparsity, thresholds=str(folder / "thresholds.json"), **options)
    return AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)


def test_from_pretrained_equals_sparsify(saved):
    loaded = load_sparse(saved)
    model = toy()
    sparsify(model, calibrate(model, batches(), progress=False), 0.5)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert not torch.equal(loaded(tokens()).logits, toy()(tokens()).logits)
    assert all(module.w_down_t.is_contiguous() for module in cats_mlps(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    model = toy(family)
    sparsify(model, constant_thresholds(model), [0.2, 0.4, 0.6], prefill="masked")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "cats"
    assert config["quantization_config"]["sparsity"] == [0.2, 0.4, 0.6]
    assert "auto_map" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    for module in cats_mlps(again):
        assert module.threshold.dtype == torch.float32 and module.w_down_t.is_contiguous()
    again.save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(twice(tokens()).logits, model(tokens()).logits)


def test_plain_from_pretrained_in_another_process(saved):
    model = load_sparse(saved)
    model.save_pretrained(saved / "sparse")
    torch.save(tokens(), saved / "ids.pt")
    command = [
        sys.executable,
        "-c",
        PLAIN_LOAD,
        *(str(saved / name) for name in ("sparse", "ids.pt", "out.pt")),
    ]
    subprocess.run(command, check=True, cwd=saved, timeout=300)
    out = torch.load(saved / "out.pt", weights_only=True)
    assert out["mlp"] == "CatsMLP"
    assert torch.equal(out["logits"], model(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype(saved, dtype):
    config = CatsConfig(sparsity=0.5, thresholds=saved / "thresholds.json")
    model = AutoModelForCausalLM.from_pretrained(saved / "dense", quantization_config=config, dtype=dtype)
    assert model.dtype == dtype
    full = cats_mlps(load_sparse(saved))
    assert all(torch.equal(m.threshold, f.threshold) for m, f in zip(cats_mlps(model), full, strict=True))
    model.save_pretrained(saved / "half")
    again = AutoModelForCausalLM.from_pretrained(saved / "half")
    assert again.dtype == dtype
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("per", ["neuron", "weighted"])
def test_threshold_per_neuron_round_trip(per, tmp_path):
    model = toy()
    options = {"per": "neuron"} if per == "neuron" else {"weights": torch.rand(3, 80) + 0.1}
    thresholds = calibrate(model, batches(), progress=False, **options)
    thresholds.save(tmp_path / "t.json")
    model.save_pretrained(tmp_path / "dense")
    config = CatsConfig(0.5, tmp_path / "t.json")
    assert config.per == "neuron"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    loaded.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert cats_mlps(again)[0].threshold.shape == (80,)
    sparsify(model, thresholds, 0.5)
    for other in (loaded, again):
        assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_loaded_model_is_an_ordinary_one(saved):
    model = load_sparse(saved, prefill="dense")
    assert cats_mlps(model)[0].prefill == "dense"
    model.half().float().train()
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad.abs().sum() > 0
    restore(model)
    model.save_pretrained(saved / "restored")
    assert not hasattr(AutoConfig.from_pretrained(saved / "restored"), "quantization_config")
    assert (
        type(AutoModelForCausalLM.from_pretrained(saved / "restored").model.layers[0].mlp).__name__
        == "LlamaMLP"
    )


def test_sparsity_can_change_after_loading(saved):
    from cats import Thresholds

    model = load_sparse(saved, 0.3)
    set_sparsity(model, Thresholds.load(saved / "thresholds.json"), 0.8)
    with SparsityMeter(model) as meter:
        model(tokens())
    assert abs(meter.overall - 0.8) < 0.05
    model.save_pretrained(saved / "sparse")
    assert (
        json.loads((saved / "sparse" / "config.json").read_text())["quantization_config"]["sparsity"] == 0.8
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_generate(family):
    model = toy(family)
    sparsify(model, constant_thresholds(model), 0.4)
    prompt = tokens(rows=2, length=6)
    out = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 14)
    ids = prompt
    with torch.no_grad():
        for _ in range(8):  # the same without a cache: every token is masked the same way
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, model.generation_config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, ids)


def test_lora_attaches_trains_and_merges():
    from peft import LoraConfig, get_peft_model

    model = toy()
    sparsify(model, constant_thresholds(model), 0.3)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"))
    assert sum("mlp" in name and "lora_A" in name for name, _ in adapted.named_parameters()) == 9
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    ids = tokens()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with SparsityMeter(adapted) as meter, torch.no_grad():
        expected = adapted(input_ids=ids).logits
    assert 0 < meter.overall < 1
    merged = adapted.merge_and_unload()
    assert len(cats_mlps(merged)) == 3
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(p, frozen[name]) for name, p in merged.named_parameters())
    dense = restore(merged)
    assert "CatsMLP" not in {type(module).__name__ for module in dense.modules()}


def test_adapters_attached_to_a_sparse_model_survive_restore():
    from peft import LoraConfig, get_peft_model

    model = toy()
    sparsify(model, constant_thresholds(model), 0.3)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    sparsify(adapted, constant_thresholds(adapted), 0.0)
    with torch.no_grad():
        expected = adapted(input_ids=tokens()).logits
        restore(adapted)
        assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 3
        torch.testing.assert_close(adapted(input_ids=tokens()).logits, expected)


def test_thresholds_for_another_model_are_refused(saved):
    toy(num_hidden_layers=2).save_pretrained(saved / "dense")
    with pytest.raises(CatsError, match=r"for 3 layers .* the model has 2"):
        load_sparse(saved)
    toy(seed=3).save_pretrained(saved / "dense")
    with pytest.raises(CatsError, match="other weights"):
        load_sparse(saved)


def test_config_refuses_what_cannot_be(saved):
    file = saved / "thresholds.json"
    for sparsity in (1.0, -1, [0.5, 0.5], "half"):
        with pytest.raises(CatsError):
            CatsConfig(sparsity, file)
    with pytest.raises(CatsError, match="Unknown prefill"):
        CatsConfig(0.5, file, prefill="none")
    with pytest.raises(CatsError, match="needs thresholds"):
        CatsConfig(0.5, None)
    with pytest.raises(CatsError, match="cannot be read"):
        CatsConfig(0.5, saved / "missing.json")


def test_saved_config_on_dense_weights_is_refused(saved):
    sparse = load_sparse(saved)
    sparse.save_pretrained(saved / "sparse")
    (saved / "sparse" / "model.safetensors").write_bytes((saved / "dense" / "model.safetensors").read_bytes())
    with pytest.raises(CatsError, match="has 0 thresholds for 3 layers"):
        AutoModelForCausalLM.from_pretrained(saved / "sparse")


def test_dense_model_with_a_saved_config_needs_a_file(saved):
    sparse = load_sparse(saved)
    with pytest.raises(CatsError, match="needs threshold values"):
        AutoModelForCausalLM.from_pretrained(
            saved / "dense", quantization_config=sparse.config.quantization_config
        )


@pytest.mark.parametrize(
    "change", [dict(unknown=1), dict(thresholds="nofile.json"), dict(sparsity=2), dict(thresholds=None)]
)
def test_an_edited_config_is_refused_in_a_sentence(saved, change):
    load_sparse(saved).save_pretrained(saved / "sparse")
    file = saved / "sparse" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(CatsError):
        AutoModelForCausalLM.from_pretrained(saved / "sparse")
    del config["quantization_config"]["sparsity"]
    file.write_text(json.dumps(config))
    with pytest.raises(CatsError, match="lacks or garbles a setting"):
        AutoModelForCausalLM.from_pretrained(saved / "sparse")

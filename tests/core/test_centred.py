"""The rule `centred` built into a model: equal to the rule as it is evaluated, saved, loaded, taken out."""

import copy
import json

import pytest
import torch
from cats_kernels import centred
from toys import batches, constant_thresholds, tokens, toy
from transformers import AutoModelForCausalLM

from cats import (
    CatsError,
    SparsityMeter,
    calibrate,
    calibrate_centred,
    cats_mlps,
    criteria,
    restore,
    sparsify,
)
from cats.core.centred import CentredMLP
from cats.core.centres import Centres
from cats.core.structure import find_gated_mlps
from cats.criteria import refit_centred
from cats.criteria.masking import Masking, Policy
from cats.criteria.sites import attached
from cats.decoding import attention
from cats.decoding import graph as decoding
from cats.finetuning import autograd as fused


def fitted(family="llama", rule="centred"):
    model = toy(family)
    return model, criteria.rule(rule).calibrate(model, batches(), progress=False)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def centres(monkeypatch):
    """Centres in all layers but the second, whatever is nearer: random weights rarely want them."""
    monkeypatch.setattr(Centres, "pays", lambda self, layer, sparsity: layer != 1)
    monkeypatch.setattr(refit_centred, "_pays", lambda lost, without: True)


@pytest.fixture
def installed(centres):
    model, fit = fitted()
    return fit.install(model, 0.5)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_equals_the_rule_as_it_is_evaluated(family, sparsity, centres):
    model, fit = fitted(family)
    dense = logits(model)
    expected = logits(fit.apply(model, sparsity))
    fit.undo(model)
    found = logits(fit.install(model, sparsity))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, dense, rtol=1e-3, atol=1e-3)
    assert sum(isinstance(module, CentredMLP) for module in model.modules()) == 2
    assert torch.equal(logits(restore(model)), dense), "the dense model, bit for bit"
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_fitted_matrix_is_built_in_as_it_is_evaluated(family, centres):
    model, fit = fitted(family, "refit-centred")
    dense = logits(model)
    expected = logits(fit.apply(model, 0.4))
    assert all(site.bypass is not None for site in attached(model))
    assert torch.equal(logits(fit.undo(model)), dense)
    torch.testing.assert_close(logits(fit.install(model, 0.4)), expected, rtol=1e-3, atol=1e-3)
    assert sum(isinstance(module, CentredMLP) for module in model.modules()) == 3


def test_the_matrix_is_the_ridge_regression_of_what_is_lost(centres):
    model, fit = fitted(rule="refit-centred")
    mlp = find_gated_mlps(model)[0]
    seen = []
    hook = mlp.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in batches():
        logits_of(model, batch)
    hook.remove()
    kept = [batch["attention_mask"].bool() for batch in batches()]
    xs = [x[valid] for x, valid in zip(seen, kept, strict=True)]
    moments = cross = 0
    with torch.no_grad():
        for x in xs:
            wanted = mlp.module(x)
            site = fit.definition.site(mlp, fit.state, 0.4, centred=True)
            site.attach()
            lost = wanted - mlp.module(x)
            site.detach()
            size = wanted.pow(2).sum(1, keepdim=True)
            chosen = torch.arange(len(x)) % 5 != 0
            x, lost = (part[chosen] / (size + 1e-3 * size.mean()).sqrt()[chosen] for part in (x, lost))
            moments, cross = moments + x.t() @ x, cross + x.t() @ lost
        moments += refit_centred.RIDGE * moments.diagonal().diag()
        expected = torch.linalg.solve(moments, cross)
    found = attached(fit.apply(model, 0.4))[0]
    torch.testing.assert_close(found.bypass.matrix, expected, rtol=1e-3, atol=1e-5)


def test_tokens_that_are_not_masked_get_no_matrix(centres):
    model, fit = fitted(rule="refit-centred")
    dense = logits(model)
    fit.apply(model, 0.4)
    with Masking(model, Policy(prefill="dense")):
        assert torch.equal(logits(model), dense)
    with Masking(model, Policy(first_token="dense")):
        torch.testing.assert_close(logits(model)[:, :1], dense[:, :1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits(model)[:, 1:], dense[:, 1:], rtol=1e-2, atol=1e-2)


def test_a_matrix_that_does_not_pay_is_left_out():
    assert refit_centred._pays(torch.ones(3), torch.full((3,), 2.0))
    assert not refit_centred._pays(torch.ones(3), torch.ones(3))
    model, fit = fitted(rule="refit-centred")
    fit.apply(model, 0.95)
    assert {site.weights_added for site in attached(model)} == {0}


def test_layers_without_centres_have_none():
    model, fit = fitted()
    fit.install(model, 0.99)  # A would take as much as all neurons that are left
    assert not any(isinstance(module, CentredMLP) for module in model.modules())
    expected = logits(model)
    restore(model)
    torch.testing.assert_close(expected, logits(fit.apply(model, 0.99)), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_by_plain_from_pretrained(installed, tmp_path):
    installed.save_pretrained(tmp_path / "once")
    config = json.loads((tmp_path / "once" / "config.json").read_text())["quantization_config"]
    layers = [n for n, layer in enumerate(installed.model.layers) if isinstance(layer.mlp, CentredMLP)]
    assert config["centred"] == layers == [0, 2] and config["per"] == "neuron"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert torch.equal(logits(again), logits(installed))
    again.save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(logits(twice), logits(installed))
    assert torch.equal(logits(restore(twice)), logits(restore(installed)))


def test_a_cast_keeps_what_is_compared_exact(installed):
    kept = [module.centre.clone() for module in installed.modules() if isinstance(module, CentredMLP)]
    half = installed.to(torch.bfloat16)
    modules = [module for module in half.modules() if isinstance(module, CentredMLP)]
    for module, centre in zip(modules, kept, strict=True):
        assert module.shared.dtype == torch.bfloat16
        assert module.threshold.dtype == module.centre.dtype == torch.float32
        assert torch.equal(module.centre, centre)
    assert logits(half).isfinite().all()


def test_one_token_by_the_op(installed):
    """What a GPU calls for one token, here by dense products, on what the module holds."""
    module = next(module for module in installed.modules() if isinstance(module, CentredMLP))
    x = torch.randn(1, module.hidden_size, generator=torch.Generator().manual_seed(0))
    weights = module.w_gate, module.w_up, module.w_down_t
    with torch.no_grad():
        y = centred.centred_mlp(
            x, *weights, module.shared, module.centre, module.threshold, module.activation
        )
        torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-6)


def test_generates_as_it_reads(installed):
    prompt = tokens(1, 6)
    new = installed.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    step = installed.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(new, step) and new.shape == (1, 14)


def test_compiles_is_copied_and_decodes_in_the_own_loop(installed):
    expected = logits(installed)
    compiled = torch.compile(installed, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled), expected)
    assert torch.equal(logits(copy.deepcopy(installed)), expected)
    prompt = tokens(1, 6)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    new = installed.generate(prompt, **options)
    attention.install(installed)
    assert torch.equal(installed.generate(prompt, custom_generate=decoding.greedy, **options), new)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: Masking(model).__enter__(),
        lambda model: SparsityMeter(model).__enter__(),
        fused.attach,
    ],
)
def test_what_watches_or_trains_a_fitted_matrix_is_refused(use, centres):
    model, fit = fitted(rule="refit-centred")
    before = logits(fit.install(model, 0.4))
    with pytest.raises(CatsError, match="has the rule refit-centred built in"):
        use(model)
    assert torch.equal(logits(model), before)


def test_a_fitted_matrix_is_still_one_when_it_is_loaded(centres, tmp_path):
    model, fit = fitted(rule="refit-centred")
    fit.install(model, 0.4).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(CatsError, match="has the rule refit-centred built in"):
        SparsityMeter(again).__enter__()


def test_calibrating_on_it_is_refused(installed):
    before = logits(installed)
    with pytest.raises(CatsError, match="has the rule centred built in"):
        calibrate(installed, batches(), progress=False)
    with pytest.raises(CatsError, match="sparse already"):
        calibrate_centred(installed, batches(), progress=False)
    assert torch.equal(logits(installed), before)


def test_what_watches_sees_the_same(installed):
    expected = logits(installed)
    with SparsityMeter(installed) as meter:
        assert torch.equal(logits(installed), expected)
    with Masking(installed) as masking:
        torch.testing.assert_close(logits(installed), expected, rtol=1e-5, atol=1e-5)
        realised = masking.realised()["prefill"]
    taken_off = [module.overhead for module in cats_mlps(installed)]
    expected_by_layer = [share + more for share, more in zip(realised["by_layer"], taken_off, strict=True)]
    assert meter.by_layer.tolist() == pytest.approx(expected_by_layer, abs=1e-4)
    fused.attach(installed)
    assert torch.equal(logits(installed), expected)


def test_cats_takes_its_place(installed):
    sparsify(installed, constant_thresholds(toy()), 0.5)
    assert torch.equal(logits(installed), logits(sparsify(toy(), constant_thresholds(toy()), 0.5)))


def test_what_is_refused_changes_nothing(installed):
    before = logits(installed)
    with pytest.raises(CatsError, match="These thresholds are for"):
        sparsify(installed, constant_thresholds(toy("gemma3")), 0.5)
    fit = criteria.rule("centred").calibrate(toy(), batches(), progress=False)
    for again in (fit.install, fit.apply):
        with pytest.raises(CatsError, match="sparse already: undo that first"):
            again(installed, 0.5)
    assert torch.equal(logits(installed), before)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5])
def test_sparsities_outside_are_told(sparsity):
    model, fit = fitted()
    with pytest.raises(CatsError, match=r"is outside \(0, 1\)"):
        fit.install(model, sparsity)


def test_a_model_under_evaluation_is_not_built_over():
    model, fit = fitted()
    fit.apply(model, 0.5)
    with pytest.raises(CatsError, match="undo that first"):
        fit.install(model, 0.5)

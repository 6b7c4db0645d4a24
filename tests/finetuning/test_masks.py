"""The mask of a training step, alone, compiled, and around a centre."""

import evaluation_toys
import pytest
import torch
from finetuning_toys import CATS, curve, heldout_nll
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cats import criteria
from cats.core import activation
from cats.core.centred import CentredMLP
from cats.core.structure import cats_mlps
from cats.criteria.masking import Masking, Policy
from cats.errors import CatsError
from cats.finetuning import Recipe, autograd, learned, save
from cats.finetuning import adapt as adapting
from cats.finetuning.adapt import apply


@pytest.mark.parametrize("changes", [{}, dict(anneal=0.5), dict(learn_thresholds=True, distil=0.5)])
def test_compiled_layers_train_to_the_same_curve(run, monkeypatch, changes):
    monkeypatch.setattr(adapting, "BACKEND", "aot_eager")  # needs no compiler of C++
    torch._dynamo.reset()
    counters.clear()
    found = curve(run("compiled", **CATS, **changes, compile=True))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled"
    assert curve(run("plain", **CATS, **changes)) == pytest.approx(found, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs, "accelerate's own setting is back"


@pytest.mark.parametrize("learn", [False, True])
def test_the_masks_of_all_layers_are_one_compilation(learn, batches):
    model = evaluation_toys.loaded(num_hidden_layers=5).model
    fit = criteria.rule("cats").calibrate(model, batches, progress=False)
    fit.apply(model, 0.5)
    if learn:
        learned.LearnedThresholds(model, fit.thresholds, 0.5).attach()
    else:
        autograd.attach(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    hidden = torch.randn(2, 7, model.config.hidden_size, requires_grad=True)
    for mlp in cats_mlps(model):
        torch.compile(mlp, backend=counter)(hidden)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_the_mask_of_a_training_step_has_the_value_and_gradients_of_the_definition(name, dtype):
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 7, 33, generator=draw).to(dtype) for _ in range(3)]
    values[0][0, 0, 0] = float("nan")
    act = activation.ACTIVATIONS[name]
    z = act(values[0].float()).abs()
    for threshold in (z[1, 1, 1].clone(), torch.rand(33, generator=draw), torch.tensor(0.0)):
        found, expected = ([value.clone().requires_grad_() for value in values[:2]] for _ in range(2))
        product = autograd.masked_product(*found, threshold, name)
        once = act(expected[0])
        exact = activation.unrounded(act, expected[0], once)
        reference = activation.cats(once, threshold, exact) * expected[1]
        assert torch.equal(product.nan_to_num(9), reference.nan_to_num(9)) and product[0, 0, 0].isnan()
        product.backward(values[2])
        reference.backward(values[2])
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.grad.nan_to_num(9), other.grad.nan_to_num(9))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        autograd.masked_product(*found, threshold, name)
    assert sum(tensor.nbytes for tensor in kept) == 2 * values[0].nbytes + 4


def test_the_mask_of_a_training_step_is_one_graph_forward_and_one_backward():
    gate, up, gradient = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for function, given in ((autograd._forward, ()), (autograd._backward, (gradient,))):
        whole = torch.compile(function, fullgraph=True, backend="eager")
        for level, centre in ((0.1, None), (0.4, None), (0.1, torch.rand(8)), (0.4, torch.rand(8))):
            arguments = ("silu", gate, up, torch.tensor([level]), centre, *given)
            torch.testing.assert_close(whole(*arguments), function(*arguments))


def test_what_is_set_to_its_centre_trains_up_and_not_gate():
    gate, up, weight = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate.requires_grad_(), up.requires_grad_()
    threshold, centre = torch.full((8,), 0.3), torch.linspace(-0.2, 0.4, 8)
    found = autograd.masked_product(gate, up, threshold, "silu", centre)
    z = functional.silu(gate)
    near = (z - centre).abs() < threshold
    expected = torch.where(near, centre.double(), z) * up
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad((found * weight).sum(), (gate, up))
    wanted = torch.autograd.grad((expected * weight).sum(), (gate, up))
    for ours, theirs in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert 0.2 < near.float().mean() < 0.8 and not slopes[0][near].any() and slopes[1][near].all()


@pytest.mark.parametrize("changes", [{}, dict(tuning="full"), dict(distil=0.5)])
def test_centred_trains_without_its_matrix_and_is_folded_at_the_end(
    run, text, loaded, tmp_path, centred_everywhere, changes
):
    trained = run(rule="centred", sparsity=0.5, **changes)
    assert curve(trained)[-1] < curve(trained)[0]
    modules = cats_mlps(trained.model)
    assert all(isinstance(module, CentredMLP) and module.folded for module in modules)
    for module in modules:
        shared = (module.w_up.T * module.centre) @ module.w_down_t
        torch.testing.assert_close(module.shared, shared, rtol=1e-4, atol=1e-5)
    assert heldout_nll(trained.model, text.heldout) == pytest.approx(curve(trained)[-1], rel=1e-4)
    realised = trained.points[-1]["heldout_realised"]
    assert all(0.2 < share < 0.8 for share in realised)
    save(trained, Recipe(rule="centred", sparsity=0.5), loaded.tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert heldout_nll(again, text.heldout) == pytest.approx(curve(trained)[-1], rel=1e-4)


def test_before_training_centred_is_the_rule_as_it_is_evaluated(
    loaded, text, batches, run, centred_everywhere
):
    fitted = criteria.rule("centred").calibrate(loaded.model, batches, progress=False)
    model = evaluation_toys.loaded(num_hidden_layers=2).model
    expected = heldout_nll(fitted.apply(model, 0.5), text.heldout)
    fitted.undo(model)
    assert curve(run(rule="centred", sparsity=0.5, steps=0)) == pytest.approx([expected], rel=1e-5)
    unfolded = apply(model, Recipe(rule="centred", sparsity=0.5), fitted)
    with Masking(unfolded) as masking:
        assert heldout_nll(unfolded, text.heldout) == pytest.approx(expected, rel=1e-5)
    by_layer = masking.realised()["prefill"]["by_layer"]
    with Masking(fitted.apply(evaluation_toys.loaded(num_hidden_layers=2).model, 0.5)) as by_rule:
        heldout_nll(by_rule.model, text.heldout)
    assert by_layer == pytest.approx(by_rule.realised()["prefill"]["by_layer"], abs=1e-5)
    with Masking(unfolded, Policy(prefill="dense")):
        assert heldout_nll(unfolded, text.heldout) == pytest.approx(
            heldout_nll(loaded.model, text.heldout), rel=1e-6
        )
    with pytest.raises(CatsError, match="no thresholds to anneal or learn"):
        run("annealed", rule="centred", sparsity=0.5, anneal=0.5)


def test_training_masks_in_one_pass_and_measures_as_the_mlp_does(run, monkeypatch):
    calls = {True: 0, False: 0}
    forward = activation.CatsMLP.forward

    def watched(self, x):
        calls[torch.is_grad_enabled()] += self.combine is not None
        return forward(self, x)

    monkeypatch.setattr(activation.CatsMLP, "forward", watched)
    trained = run(**CATS, recalibrate=512)
    assert calls == {True: 6 * 2 * 2, False: 0}  # steps, passes, layers
    assert all(module.combine is None for module in cats_mlps(trained.model))

"""Rules of one interface: hand-computed examples, realised sparsity, and that applying and undoing leaves
no trace."""

import pytest
import torch
import toys
from torch import nn
from transformers import AutoModelForCausalLM

from cats import criteria
from cats.calibration.blocks import block_inputs
from cats.calibration.calibrate import calibrate
from cats.calibration.observe import Observation, SparsityMeter
from cats.core.accounting import account
from cats.core.sparsify import restore, sparsify
from cats.core.structure import cats_mlps, find_gated_mlps
from cats.criteria import allocated, dense_ends, fisher, neuron, online, pruning, refit, sited
from cats.criteria.masking import Masking
from cats.errors import CatsError

GATE_RULES = [
    name
    for name, rule in criteria.RULES.items()
    if rule.adjustable
    and name not in ("wanda", "magnitude", "sirius")
    and not isinstance(rule, sited.SitedRule)  # those are in test_rivals
]
IDS = toys.tokens(seed=9)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def model():
    return toys.toy("llama", num_hidden_layers=6)


@pytest.fixture
def text():
    return toys.batches(6)


def factors(model, batches):
    """z and x W_up of every layer over valid tokens, [L, N, m]."""
    seen = [[] for _ in find_gated_mlps(model)]
    sparsify(model, toys.constant_thresholds(model), 0.0)
    with Observation(model, lambda layer, module, z, up: seen[layer].append((z, up))), torch.no_grad():
        for batch in batches:
            model(**batch)
    restore(model)
    return [torch.stack([torch.cat(part) for part in zip(*layer, strict=True)]) for layer in seen]


@pytest.mark.parametrize("name", list(criteria.RULES))
def test_calibrating_and_undoing_leave_the_model_as_it_was(name, model, text):
    before = logits(model)
    rule = criteria.rule(name)
    fit = rule.calibrate(model, text, progress=False)
    assert torch.equal(logits(model), before)
    fit.apply(model, 0.5 if rule.adjustable else None)
    with Masking(model) as masking:
        masking.begin("prefill", torch.ones_like(IDS, dtype=torch.bool))
        assert not torch.equal(logits(model), before)
    fit.undo(model)
    assert torch.equal(logits(model), before)
    assert rule.title and rule.what and "criterion" in fit.describe()


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@pytest.mark.parametrize("name", GATE_RULES)
def test_the_calibration_text_realises_the_target(name, sparsity, model, text):
    fit = criteria.rule(name).calibrate(model, text, progress=False)
    fit.apply(model, sparsity)
    with SparsityMeter(model) as meter, torch.no_grad():
        for batch in text:
            model(**batch)
    # masks of earlier layers change the inputs of later ones, so it is near the target and not on it
    assert meter.overall == pytest.approx(sparsity, abs=0.03)
    shape = account(model)
    assert fit.gate_sparsity(sparsity) == sparsity
    assert fit.bytes_per_token(shape, sparsity) == shape.bytes_per_token(sparsity)


@pytest.mark.parametrize("name", ["wanda", "magnitude"])
def test_pruning_zeroes_half_of_every_linear_layer(name, model, text):
    fit = criteria.rule(name).calibrate(model, text, progress=False)
    fit.apply(model, 0.5)
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                assert (module.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert (model.lm_head.weight == 0).float().mean() < 0.01
    shape = account(model)
    assert fit.model_sparsity(shape, 0.5) == 0.5
    assert fit.bytes_per_token(shape, 0.5) == 2 * (shape.block_weights / 2 + shape.head_weights)
    with pytest.raises(CatsError, match="pruned already"):
        fit.apply(model, 0.5)


def test_cats_is_the_quantile_of_z(model, text):
    fit = criteria.rule("cats").calibrate(model, text, progress=False)
    for layer, (z, _) in enumerate(factors(model, text)):
        assert (z.abs() < fit.thresholds.at(0.4)[layer]).float().mean() == pytest.approx(0.4, abs=0.002)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_chess_divides_the_layers_threshold_by_mean_up(family, text):
    model = toys.toy(family)
    fit = criteria.rule("chess").calibrate(model, text, progress=False)
    for layer, (z, up) in enumerate(factors(model, text)):
        weights = up.abs().mean(0)
        torch.testing.assert_close(fit.thresholds.scale[layer], weights, rtol=1e-5, atol=1e-7)
        expected = torch.quantile((z.abs() * weights).flatten(), 0.4) / weights
        torch.testing.assert_close(fit.thresholds.at(0.4)[layer], expected, rtol=0.01, atol=0)


def test_down_norm_weighs_by_rows_of_w_down(model, text):
    fit = criteria.rule("down-norm").calibrate(model, text, progress=False)
    weight = model.model.layers[2].mlp.down_proj.weight
    torch.testing.assert_close(fit.thresholds.scale[2], weight.pow(2).sum(0).sqrt())


def test_neuron_weights_are_rms_near_the_threshold(model, text, monkeypatch):
    monkeypatch.setattr(neuron, "_PRIOR", 0)
    weights = neuron.near_rms(model, text, progress=False)
    t = calibrate(model, text, progress=False).at(0.5)
    z, up = factors(model, text)[1]
    near = (z.abs() > 0.5 * t[1]) & (z.abs() < 1.5 * t[1])
    for j in (0, 7, 79):
        assert weights[1, j] == pytest.approx(float(up[near[:, j], j].pow(2).mean().sqrt()), rel=1e-4)


def test_fisher_weights_are_gradients_times_up(model, text):
    weights = criteria.rule("fisher").weights(model, text, progress=False)
    down = model.model.layers[-1].mlp.down_proj
    kept = {}
    hooks = [
        down.register_forward_hook(lambda module, args, output: kept.update(h=args[0])),
        model.model.layers[-1].mlp.up_proj.register_forward_hook(
            lambda module, args, output: kept.update(up=output)
        ),
    ]
    total = 0
    for batch in text:
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        scores = model(**batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum")
        total = total + (torch.autograd.grad(loss, kept["h"])[0] * kept["up"]).abs().sum((0, 1)).detach()
    for hook in hooks:
        hook.remove()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in text)
    torch.testing.assert_close(weights[-1].float(), total / tokens, rtol=1e-3, atol=1e-7)


def test_one_threshold_for_all_layers_allocates(model):
    thresholds = toys.constant_thresholds(model)
    # quantile functions t = a s: a layer has the share t / a below t, so shares are in proportion to 1 / a
    scales = torch.tensor([1.0, 2.0, 4.0, 4.0, 2.0, 1.0])
    thresholds.values = scales[:, None] * torch.tensor([0.0, 1.0])
    expected = 0.3 * (1 / scales) / (1 / scales).mean()
    assert fisher.one_threshold(thresholds, 0.3) == pytest.approx(expected.tolist(), abs=2e-3)
    assert fisher.one_threshold(thresholds, 0.0) == [0.0] * 6


def test_shifted_shares_have_the_mean():
    shares = allocated.shifted_to_mean(torch.tensor([0.0, 0.2, 0.99]), 0.5)
    assert sum(shares) / 3 == pytest.approx(0.5)
    assert shares[0] < shares[1] < shares[2] == pytest.approx(0.995)


def test_equal_layers_get_equal_sparsity_and_sensitive_ones_less():
    one, two = torch.ones(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)
    assert allocated.equal_margins(one, two, 0.6) == pytest.approx([0.6, 0.6], abs=1e-3)
    low, high = allocated.equal_margins(torch.tensor([4.0, 1.0], dtype=torch.float64), two, 0.6)
    assert low < 0.6 < high and low + high == pytest.approx(1.2)
    # d/ds of c (s / (1 - s))^2 is 2 c s / (1 - s)^3: equal on both sides
    assert 4 * low / (1 - low) ** 3 == pytest.approx(high / (1 - high) ** 3, rel=0.02)


def test_curves_go_through_powers_of_the_odds():
    levels = torch.tensor(allocated.LEVELS, dtype=torch.float64)
    odds = levels / (1 - levels)
    scales, exponents = allocated.curves(torch.stack([0.1 * odds**1.5, 0.02 * odds**3]))
    assert scales.tolist() == pytest.approx([0.1, 0.02])
    assert exponents.tolist() == pytest.approx([1.5, 3.0])


def test_divergence_is_zero_without_a_mask_and_grows(model, text, monkeypatch):
    monkeypatch.setattr(allocated, "LEVELS", (0.0, 0.4, 0.9))
    found = allocated.divergences(model, calibrate(model, text, progress=False), text, progress=False)
    assert found[:, 0].abs().max() < 1e-5
    assert (found[:, 2] > found[:, 1]).all() and (found[:, 1] > 0).all()
    assert not any(type(module).__name__ == "CatsMLP" for module in model.modules())


def test_dense_ends_keep_the_total():
    assert dense_ends.ends_dense(4, 0.3) == pytest.approx([0, 0.6, 0.6, 0])
    with pytest.raises(CatsError, match=r"below 0\.50"):
        dense_ends.ends_dense(4, 0.5)


def test_relufication_zeroes_what_relu_zeroes(model, text):
    gate = model.model.layers[0].mlp.gate_proj
    inputs = {}
    hook = gate.register_forward_hook(lambda module, args, output: inputs.update(gate=output))
    logits(model)
    hook.remove()
    fit = criteria.rule("relufication").calibrate(model, text)
    fit.apply(model)
    with Masking(model) as masking:
        logits(model)
    share = masking.realised()["prefill"]["by_layer"][0]
    assert share == pytest.approx(float((inputs["gate"] <= 0).float().mean()), abs=1e-5)
    assert fit.gate_sparsity(None) is None


def test_wanda_score_by_hand():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.5, 0.1, -0.2, 0.4]])
    norms = torch.tensor([4.0, 0.1, 1.0, 1.0])  # scores 4 0.4 2 3 and 2 0.01 0.2 0.4
    pruning._prune(weight, weight.abs() * norms, 0.5, by_row=True)
    assert weight.tolist() == [[1.0, 0.0, 0.0, 3.0], [0.5, 0.0, 0.0, pytest.approx(0.4)]]


def test_ridge_is_least_squares_with_a_pull_to_zero():
    # two neurons of three tokens, one output; the third never survives
    sums = refit.Sums.zeros(1, 3, "cpu")
    sums.add(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), torch.tensor([[1.0], [2.0]]))
    assert sums.moments.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]] and sums.cross.tolist() == [[3, 2, 0]]
    assert sums.solve(0.0).tolist() == [pytest.approx([1.0, 1.0, 0.0], abs=1e-5)]
    # half the diagonal added: [[3, 1], [1, 1.5]]^-1 [3, 2] = [2.5, 3] / 3.5
    assert sums.solve(0.5).tolist() == [pytest.approx([2.5 / 3.5, 3 / 3.5, 0.0])]


def test_fitted_rows_bring_the_output_of_a_block_nearer(model, text):
    errors = {}
    for name in ("neuron", "refit"):
        fit = criteria.rule(name).calibrate(model, text, progress=False)
        dense = valid_logits(model, text)
        fit.apply(model, 0.5)
        errors[name] = float((valid_logits(model, text) - dense).norm())
        if name == "refit":
            with pytest.raises(CatsError, match="undo that first"):
                fit.apply(model, 0.5)
        fit.undo(model)
    assert errors["refit"] < 0.95 * errors["neuron"]


@pytest.mark.parametrize("name", ["combined", "refit-combined"])
def test_a_fitted_model_is_saved_and_loaded_as_it_is(name, model, text, tmp_path):
    criteria.rule(name).calibrate(model, text, progress=False).apply(model, 0.6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    step = IDS[:, :1]  # one token a row takes the sparse kernel, which reads the fitted rows
    with torch.no_grad():
        torch.testing.assert_close(again(step).logits, model(step).logits)


def valid_logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch).logits[batch["attention_mask"].bool()] for batch in batches])


def test_magnitude_prunes_over_the_whole_matrix():
    weight = torch.tensor([[1.0, -4.0], [0.5, 0.1]])
    pruning._prune(weight, weight.abs(), 0.5, by_row=False)
    assert weight.tolist() == [[1.0, -4.0], [0.0, 0.0]]


def test_wanda_norms_leave_padding_out_and_see_pruned_blocks(model):
    text = toys.batches(1)
    layer = model.model.layers[0].self_attn.q_proj
    inputs = {}
    hook = layer.register_forward_hook(lambda module, args, output: inputs.update(x=args[0]))
    with torch.no_grad():
        model(**text[0])
        hook.remove()
        states = block_inputs(model, model.model.layers, text)
        norms = pruning._norms(model.model.layers[0], states, 0)
        expected = inputs["x"][text[0]["attention_mask"].bool()].pow(2).sum(0).sqrt()
        torch.testing.assert_close(norms["self_attn.q_proj"], expected)
        before = states[0].hidden.clone()
        states[0].advance(model.model.layers[0], 0)
    assert not torch.equal(states[0].hidden, before)


def test_steering_moves_a_threshold_towards_the_target(model):
    thresholds = toys.constant_thresholds(model)  # t = s: d log t / d s at s is 1 / s
    steering = online.Steering(thresholds, 0.5)
    assert steering.slopes[0] == pytest.approx(2.0, rel=0.01)
    sparsify(model, thresholds, 0.5)
    module = cats_mlps(model)[0]
    zeroed = torch.full((256,), 40 - 8)  # of 80: 0.4 realised, so t must rise
    steering(0, module, zeroed, None)
    weight = 1 - torch.tensor(-1.0).exp()
    assert float(module.threshold) == pytest.approx(
        0.5 * float(torch.exp(steering.slopes[0] * weight * 0.1)), rel=1e-4
    )


def test_online_holds_the_target_on_other_text(model, text):
    fit = criteria.rule("online").calibrate(model, text, progress=False)
    other = [toys.tokens(8, 64, seed=seed) % 2 + 3 for seed in range(40)]  # text of two tokens alone
    shares = {}
    for steer in (None, fit.steer(0.5)):
        fit.apply(model, 0.5)
        with Masking(model, steer=steer) as masking, torch.no_grad():
            for ids in other[:20]:
                model(input_ids=ids)
            masking.reset()
            for ids in other[20:]:
                model(input_ids=ids)
        shares[steer is not None] = masking.realised()["prefill"]["by_layer"]
    off = {steered: max(abs(share - 0.5) for share in found) for steered, found in shares.items()}
    assert off[True] < 0.01 < off[False]


def test_unknown_and_inapplicable_rules_say_so(model):
    with pytest.raises(CatsError, match="did you mean wanda"):
        criteria.rule("wandaa")
    with pytest.raises(CatsError, match="ReLU already"):
        criteria.rule("relufication").check(toys.toy("llama", hidden_act="relu"))
    with pytest.raises(CatsError, match="three layers"):
        criteria.rule("dense-ends").check(toys.toy("llama", num_hidden_layers=2))
    uneven = toys.toy("llama")
    mlp = uneven.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, nn.Linear(32, 48, bias=False))
    mlp.down_proj = nn.Linear(48, 32, bias=False)
    with pytest.raises(CatsError, match="differ in intermediate size"):
        criteria.rule("chess").check(uneven)

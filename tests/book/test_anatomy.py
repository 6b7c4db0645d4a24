"""Measures of sparsity: activity by hand, chunks by hand, and the largest sparsity inside a budget."""

import evaluation_toys
import pytest
import torch
import toys

from cats import criteria
from cats.book.analysis import anatomy
from cats.core.sparsify import sparsify
from cats.core.structure import find_gated_mlps
from cats.criteria.sited import neuron_site
from cats.criteria.sites import attach, attached
from cats.errors import CatsError


def scripted(model, pattern):
    """Neurons of the first layer active as `pattern` [T, m] says, row by row; those of the others always."""
    sites = []
    for mlp in find_gated_mlps(model):
        wanted = pattern if mlp.layer == 0 else torch.ones_like(pattern)
        sites.append(neuron_site(mlp, "gate", lambda gate, call, wanted=wanted: wanted.expand(gate.shape)))
    attach(model, sites)


def test_frequencies_and_chunks_by_hand():
    model = toys.toy("llama", intermediate_size=4)
    pattern = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]]).bool()
    scripted(model, pattern)
    batch = {"input_ids": toys.tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    batch["attention_mask"][1, :2] = 0  # the second row begins at the third token
    found = anatomy.measure(model, [batch], sizes=(1, 2, 3), progress=False)
    assert found.tokens == 8
    assert found.frequency[0].tolist() == [1, 2 / 8, 0, 3 / 8]
    first = found.by_layer().iloc[0]
    assert first.sparsity == pytest.approx(1 - 13 / 32)
    assert first.never_active == 0.25 and first.always_active == 0.25 and first.often_active == 0.25
    assert first.busiest_tenth == pytest.approx(8 / 13)
    chunks = found.chunks[found.chunks.layer == 0].set_index("chunk_tokens")
    # rows of 5 and 3 tokens: pairs 01 23 | 23, triples 012 | 234
    assert chunks.chunks.tolist() == [8, 3, 2]
    assert chunks.sparsity.tolist() == pytest.approx([1 - 13 / 32, (2 + 2 + 2) / 12, (1 + 1) / 8])
    assert chunks.by_frequency[2] == pytest.approx((0 + 0.75**2 + 1 + (5 / 8) ** 2) / 4)
    assert chunks.independent[2] == pytest.approx((1 - 13 / 32) ** 2)
    assert found.by_layer().sparsity[1] == 0
    with pytest.raises(CatsError, match="No row of the text has 6 tokens"):
        anatomy.measure(model, [batch], sizes=(6,), progress=False)


def test_a_relu_model_is_measured_as_it_is():
    model = toys.toy("llama", hidden_act="relu")
    seen = []
    handle = model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda m, args, out: seen.append(out))
    text = toys.batches(2, padded=False)
    found = anatomy.measure(model, text, sizes=(1,), progress=False)
    handle.remove()
    gates = torch.cat(seen).flatten(0, 1)
    torch.testing.assert_close(found.frequency[1], (gates > 0).double().mean(0))
    assert anatomy.measure(toys.toy("llama"), text, sizes=(1,), progress=False).by_layer().sparsity.max() == 0


@pytest.mark.parametrize("name", ["cats", "top-k", "up-threshold", "relufication"])
def test_rules_are_measured_where_they_are_applied(name):
    model, text = toys.toy("llama"), toys.batches(4)
    rule = criteria.rule(name)
    fit = rule.calibrate(model, text, progress=False)
    fit.apply(model, 0.6)
    found = anatomy.measure(model, text, sizes=(1, 2, 8), progress=False)
    fit.undo(model)
    sparsity = found.by_layer().sparsity
    assert sparsity.mean() == pytest.approx(0.6 if rule.adjustable else 0.5, abs=0.05)
    for _, rows in found.chunks.groupby("layer"):
        assert rows.sparsity.is_monotonic_decreasing
        assert (rows.sparsity - rows.by_frequency).abs().max() < 0.1  # random text has no topics


def test_few_tokens_are_not_hidden_by_the_kernel():
    model = toys.toy("llama")
    sparsify(model, toys.constant_thresholds(model), 0.5)
    batch = {"input_ids": toys.tokens(1, 3), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    found = anatomy.measure(model, [batch], sizes=(1,), progress=False)
    assert found.tokens == 3 and (found.by_layer().sparsity > 0.1).all()


def test_the_budget_is_spent_and_not_exceeded():
    loaded = evaluation_toys.loaded()
    text = toys.batches(4)
    documents = ["the cat sat on a mat and saw two birds " * 3, "it flew over again and over the mat " * 3]
    fit = criteria.rule("teal").calibrate(loaded.model, text, progress=False)
    options = dict(tolerance=0.05, max_length=64, progress=False)
    low, high = (
        anatomy.budgeted_sparsity(loaded.model, loaded.tokenizer, fit, documents, budget=budget, **options)
        for budget in (0.01, 0.3)
    )
    for found, budget in ((low, 0.01), (high, 0.3)):
        assert found["perplexity"] <= (1 + budget) * found["dense_perplexity"]
        assert found["realised_model_sparsity"] == pytest.approx(found["sparsity"], abs=0.08)
    assert low["sparsity"] <= high["sparsity"]
    assert high["sparsity"] > 0 and len(high["by_layer"]) == 3
    assert not attached(loaded.model)
    everything = anatomy.budgeted_sparsity(
        loaded.model, loaded.tokenizer, fit, documents, budget=1e9, most=0.7, **options
    )
    assert (everything["sparsity"], everything["steps"]) == (0.7, 1)
    with pytest.raises(CatsError, match="allows nothing"):
        anatomy.budgeted_sparsity(loaded.model, loaded.tokenizer, fit, documents, budget=0)


def test_what_is_measured_leaves_no_trace():
    model = toys.toy("llama")
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    anatomy.measure(model, toys.batches(1), sizes=(1,), progress=False)
    assert before == {name: len(module._forward_hooks) for name, module in model.named_modules()}

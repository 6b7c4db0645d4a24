"""Sirius: generation by CATS that the dense model corrects."""

import pytest
import torch
import toys
from rule_toys import logits

from cats import criteria
from cats.core.accounting import account
from cats.criteria import (
    sirius,
)
from cats.criteria.masking import Masking, Policy
from cats.errors import CatsError

PROMPTS = [[5, 9, 33, 70], [8, 8, 21, 90, 14, 101, 3], [60, 61]]


DENSE_PROMPT = Policy(prefill="dense")  # as Sirius reads it: the first token is the dense model's too


def continued(model, fit, sparsity, policy=None):
    """What is added to PROMPTS, and what was realised while decoding."""
    with Masking(model, policy) as masking:
        found = fit.continuing(sparsity)(
            model,
            PROMPTS,
            new_tokens=20,
            eos=[2],
            ended=lambda ids: None,
            masking=masking,
            prefill_tokens=256,
        )
    return found, masking.realised().get("decode")


@pytest.mark.parametrize("likelihood", [0.0, 1.01])
def test_sirius_that_never_or_always_corrects(likelihood, model, text, monkeypatch):
    fit = criteria.rule("sirius").calibrate(model, text, progress=False)
    dense, _ = continued(model, criteria.ThresholdFit("cats", toys.constant_thresholds(model)), 0.0)
    cats = criteria.rule("cats").calibrate(model, text, progress=False)
    cats.apply(model, 0.9)
    plain, _ = continued(model, cats, 0.9, DENSE_PROMPT)
    assert plain != dense
    monkeypatch.setattr(sirius, "PERIOD", 4)
    monkeypatch.setattr(sirius, "LIKELIHOOD", likelihood)
    found, decode = continued(model, fit, 0.9)
    counts = fit.counted()
    tokens = sum(map(len, found))
    assert counts["corrected_tokens"] == tokens
    assert counts["corrected_sparse_steps"] == 3 * counts["corrected_dense_steps"] == decode["tokens"]
    assert decode["gate_sparsity"] > 0.7
    # never: four tokens a round; always: one, the dense model's
    rounds = tokens if likelihood else sum(-(-len(row) // 4) for row in found)
    assert counts["corrected_dense_steps"] == rounds
    assert (found == dense) == bool(likelihood)
    assert fit.counted()["corrected_tokens"] == 0


def test_sirius_keeps_what_is_likely(model, text, monkeypatch):
    """Every token has, given all before it, the likelihood asked for, or is the dense model's own."""
    monkeypatch.setattr(sirius, "PERIOD", 5)
    monkeypatch.setattr(sirius, "LIKELIHOOD", 0.03)
    fit = criteria.rule("sirius").calibrate(model, text, progress=False)
    fit.apply(model, 0.9)
    found, _ = continued(model, fit, 0.9)
    counts = fit.counted()
    assert 1 < sum(map(len, found)) / counts["corrected_dense_steps"] < 5
    fit.undo(model)
    others = 0
    for prompt, added in zip(PROMPTS, found, strict=True):
        chances = (logits(model, torch.tensor([prompt + added])) / sirius.TEMPERATURE).softmax(-1)[0]
        for place, token in enumerate(added, len(prompt) - 1):
            own = int(chances[place].argmax()) == token
            others += not own
            assert own or float(chances[place, token]) > 0.03 - 1e-4
    assert others > 0


def test_sirius_counts_its_dense_steps(model):
    rule, shape = criteria.rule("sirius"), account(model)
    own = rule.sparsity_for(shape, 0.25)
    fit = sirius.SiriusFit("sirius", toys.constant_thresholds(model))
    assert own == pytest.approx(0.25 * 16 / 15 / shape.max_model_sparsity)
    assert fit.model_sparsity(shape, own) == pytest.approx(0.25)
    weights = shape.block_weights + shape.head_weights
    expected = 2 * (15 * (weights - own * shape.skippable_weights) + weights) / 16
    assert fit.bytes_per_token(shape, own) == pytest.approx(expected)
    with pytest.raises(CatsError, match="sliding windows"):
        continued(toys.toy("gemma3"), fit, 0.5)

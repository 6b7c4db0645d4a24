"""Every rule of sites: the model-level target, other families, and that it leaves no trace."""

import pytest
import torch
import toys
from rule_toys import logits

from cats import criteria
from cats.core.accounting import account
from cats.criteria import (
    sited,
)
from cats.criteria.masking import Masking
from cats.criteria.sites import attached, detach
from cats.errors import CatsError

RIVALS = [name for name, rule in criteria.RULES.items() if isinstance(rule, sited.SitedRule)]


# where the realised share is not near the target by construction: how far from what
TOLERANCES = {
    # random pre-activations are nearly Gaussian
    "statistical-top-k": lambda target: (0.05, target),
    # half of a text is its prompt, read dense
    "griffin": lambda target: (0.03, target / 2),
}


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("target", [0.33])
def test_the_calibration_text_realises_the_model_level_target(name, target, model, text):
    rule, shape = criteria.rule(name), account(model)
    own = rule.sparsity_for(shape, target)
    fit = rule.calibrate(model, text, progress=False)
    assert fit.model_sparsity(shape, own) == pytest.approx(target)
    expected = 2 * (shape.block_weights * (1 - target) + shape.head_weights)
    assert fit.bytes_per_token(shape, own) == pytest.approx(expected)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    fit.apply(model, own)
    with Masking(model) as masking, torch.no_grad():
        for batch in text:
            masking.begin("prefill", batch["attention_mask"].bool())
            model(**batch)
    found = masking.realised()["prefill"]
    assert found["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in text)
    tolerance, expected = TOLERANCES.get(name, lambda target: (0.03, target))(target)
    assert found["skipped_weights"] / shape.block_weights == pytest.approx(expected, abs=tolerance)
    assert len(found["by_layer"]) == 4
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    fit.undo(model)
    assert not attached(model)


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
@pytest.mark.parametrize("name", RIVALS)
def test_other_families_and_16_bits(name, family, text):
    model = toys.toy(family, dtype=torch.bfloat16)
    before = logits(model)
    rule = criteria.rule(name)
    try:
        rule.check(model)
    except CatsError as error:
        assert family == "phi3" and "fused" in str(error)
        return
    fit = rule.calibrate(model, text[:2], progress=False).apply(model, 0.3)
    after = logits(model)
    assert after.isfinite().all() and not torch.equal(after, before)
    detach(model)
    assert torch.equal(logits(model), before)
    assert fit is model


def test_model_levels_out_of_reach_say_so(model):
    shape = account(model)
    assert criteria.rule("cats").sparsity_for(shape, 0.3) == pytest.approx(0.3 / shape.max_model_sparsity)
    with pytest.raises(CatsError, match=r"cats cannot reach a model-level sparsity of 90\.0%"):
        criteria.rule("cats").sparsity_for(shape, 0.9)
    assert criteria.rule("wanda").sparsity_for(shape, 0.4) == 0.4
    with pytest.raises(CatsError, match="no sparsity of choice"):
        criteria.rule("relufication").sparsity_for(shape, 0.4)

"""Rules of neurons without thresholds of CATS: top-k, up-threshold, statistical ones and GRIFFIN."""

import pytest
import torch
import toys
from rule_toys import gate_of

from cats import criteria
from cats.criteria import (
    griffin,
    statistical_magnitude,
    statistical_top_k,
)
from cats.criteria.masking import Masking
from cats.criteria.sites import Call, detach
from cats.errors import CatsError


def test_top_k_keeps_as_many_of_every_token(model):
    rule = criteria.rule("top-k")
    rule.calibrate(model, None).apply(model, 0.6)
    z, _, h = gate_of(model, layer=0)
    assert ((z != 0).sum(-1) == 32).all()  # of 80
    detach(model)
    dense, dense_up, _ = gate_of(model, layer=0)
    order = dense.abs().argsort(dim=-1)
    kept = dense.gather(-1, order[..., 48:])
    torch.testing.assert_close(z.abs().sum(-1), kept.abs().sum(-1))
    torch.testing.assert_close(h, z * dense_up)


def test_up_threshold_masks_by_up(model, text):
    fit = criteria.rule("up-threshold").calibrate(model, text, progress=False)
    _, dense_up, dense_h = gate_of(model, layer=0)
    fit.apply(model, 0.5)
    _, _, h = gate_of(model, layer=0)
    t = fit.state.at(0, 0.5)
    torch.testing.assert_close(h, torch.where(dense_up.abs() >= t, dense_h, 0.0))
    seen = []
    detach(model)
    hook = model.model.layers[2].mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        for batch in text:
            model(**batch)
    hook.remove()
    valid = torch.cat([batch["attention_mask"].bool() for batch in text])
    values = torch.cat(seen)[valid].abs().flatten()
    assert fit.state.at(2, 0.7) == pytest.approx(float(torch.quantile(values, 0.7)), rel=0.01)


def test_statistical_top_k_by_hand():
    keep = statistical_top_k._keep(0.5)
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-8.0, 0.0, 0.0, 0.0]])  # means 1.5 and -2
    assert keep(x).tolist() == [[False, False, True, True], [False, True, True, True]]
    keep = statistical_top_k._keep(0.8413448)  # one standard deviation, 1.118, above the mean
    assert keep(x[:1]).tolist() == [[False, False, False, True]]
    assert statistical_top_k._keep(0.0)(x).all()


def test_statistical_magnitude_by_hand(model, text):
    z = torch.tensor([[0.1, -0.2, 0.3, -1.4]])  # |z| of mean 0.5 and deviation 0.5244
    expected = (z.abs() - 0.5) / 0.5244044 + statistical_magnitude._SHIFT
    torch.testing.assert_close(statistical_magnitude.standing(z), expected)
    fit = criteria.rule("statistical-magnitude").calibrate(model, text, progress=False)
    fit.apply(model, 0.5)
    found, _, _ = gate_of(model, layer=0)
    detach(model)
    dense, _, _ = gate_of(model, layer=0)
    t = fit.state.at(0, 0.5)
    assert torch.equal(found != 0, statistical_magnitude.standing(dense) >= t)
    assert len({int(row.sum()) for row in (found != 0).flatten(0, 1)}) > 1  # about as many, not exactly


def test_griffin_scores_by_hand():
    h = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [0.0, 9.0, 0.0]]])
    inside = torch.tensor([[[True], [True], [False]]])
    assert griffin.neuron_scores(h, inside).tolist() == [pytest.approx([0.36, 0.64, 1.0])]
    choice = griffin.Choice(1 / 3)
    call = Call("prefill", torch.ones(1, 3, dtype=torch.bool), torch.tensor([2]))
    assert choice(h, call).tolist() == [[[True] * 3, [True] * 3, [False, True, True]]]
    assert choice(h[:, :1], Call("decode")).tolist() == [[[False, True, True]]]


def test_griffin_chooses_for_each_row_and_leaves_padding_out(model):
    criteria.rule("griffin").calibrate(model, None).apply(model, 0.5)
    seen = {}
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: seen.update(h=args[0]))
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, :10] = False
    ids = toys.tokens(2, 24)
    with Masking(model) as masking, torch.no_grad():
        assert masking.whole_sequence
        masking.begin("prefill", valid, prompt=torch.tensor([20, 6]))
        out = model(input_ids=ids, attention_mask=valid.long(), use_cache=True)
        zeros = seen["h"] == 0
        assert not zeros[0, :20].any() and not zeros[1, 10:16].any()
        assert (zeros[0, 20:].sum(-1) == 40).all() and (zeros[1, 16:].sum(-1) == 40).all()
        sets = zeros[:, -1]
        assert not torch.equal(sets[0], sets[1])
        masking.begin("decode", torch.ones(2, 1, dtype=torch.bool))
        model(
            input_ids=ids[:, :1],
            attention_mask=torch.ones(2, 25),
            past_key_values=out.past_key_values,
        )
        assert torch.equal((seen["h"] == 0)[:, 0], sets)
    with pytest.raises(CatsError, match="behind a prompt"):
        griffin.Choice(0.5)(torch.ones(1, 1, 4))

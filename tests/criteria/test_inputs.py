"""Rules that drop inputs of linear layers, TEAL, WINA and R-Sparse, by hand and with greedy shares."""

import pytest
import torch
import toys
from rule_toys import IDS, gate_of, logits
from torch import nn

from cats import criteria
from cats.calibration.blocks import block_inputs, blocks
from cats.calibration.histogram import Quantiles
from cats.core.accounting import account
from cats.criteria import (
    greedy,
    r_sparse,
    scap,
    sited,
)
from cats.criteria.masking import Masking
from cats.criteria.sites import Site, attach, attached
from cats.errors import CatsError

WEIGHT = torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 1.0, 0.0, 0.5]])  # columns of norm 5, 1, 1, 0.5


def one(rule, weight, x, share, quantiles=None):
    """What one Linear [n, k] makes of x [N, k] under a rule of inputs."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    place = sited.BlockLinear(0, "mlp.gate_proj", linear)
    state = {place.key: criteria.rule(rule).norms(place)} if quantiles is None else quantiles
    keep = criteria.rule(rule).keep(place, state, share)
    return torch.where(keep(x, None), x, 0.0)


def test_teal_by_hand():
    found = Quantiles()
    found.see((0, "mlp.gate_proj"), torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, 6.0, -7.0, 8.0]]))
    x = torch.tensor([[-4.4, 4.6, 0.0, 9.0]])
    # half of 1 … 8 lies below 4.5
    assert one("teal", torch.ones(2, 4), x, 0.5, found).tolist() == [pytest.approx([0, 4.6, 0, 9.0])]


def test_lowest_scores_are_dropped_exactly():
    score = torch.tensor([[3.0, 1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert sited.drop_lowest(score, 0.4).tolist() == [
        [True, False, False, True, True],
        [False, False, True, True, True],
    ]
    assert sited.drop_lowest(score, 0.0).all()
    noisy = torch.randn(64, 97).bfloat16().abs().float()
    assert ((~sited.drop_lowest(noisy, 0.43)).sum(-1) == round(0.43 * 97)).all()


def test_wina_by_hand():
    # scores 1 2 1.5 2: half of them go
    x = torch.tensor([[0.2, 2.0, -1.5, -4.0], [-4.0, 2.0, 1.5, 0.2]])
    assert one("wina", WEIGHT, x, 0.5).tolist() == [[0, 2, 0, -4], [-4, 2, 0, 0]]


def test_wina_as_released_weighs_gate_and_key_alone():
    rule = criteria.rule("wina-released").base
    x = torch.tensor([[0.4, 1.0, -1.5, -3.0]])  # scores with norms 2 1 1.5 1.5
    for name, kept in (("mlp.gate_proj", [0.4, 0, -1.5, -3]), ("self_attn.v_proj", [0, 1, -1.5, -3])):
        linear = nn.Linear(4, 2)
        linear.weight.data = WEIGHT
        place = sited.BlockLinear(0, name, linear)
        state = {place.key: rule.norms(place)}
        assert torch.where(rule.keep(place, state, 0.25)(x, None), x, 0.0).tolist() == [pytest.approx(kept)]
    with pytest.raises(CatsError, match="fused"):
        criteria.rule("wina-released").check(toys.toy("phi3"))


def test_the_greedy_path_by_hand(monkeypatch):
    monkeypatch.setattr(greedy, "_STEP", 0.05)
    monkeypatch.setattr(greedy, "_MOST", 0.2)
    # 80 and 20 weights; a step is 5 of them: 1/16 of the large one's inputs, 1/5 (not 1/4) of the small one's
    path = greedy.Path([80, 20])

    def error(shares):
        return 80 * shares[0] + 100 * shares[1] ** 2

    # first steps: large 5 for 5 weights; small 4 for 4 weights, the same price: the first wins. Then again
    # large at price 1, whatever it has, until the cap
    assert path.at(0.1, error) == pytest.approx([0.125, 0])
    path = greedy.Path([80, 20])

    def dearer(shares):
        return 160 * shares[0] + 100 * shares[1] ** 2

    # large has price 2; small has 4/4, then 12/4: one step of the small one, 4 weights, then the large one
    assert path.at(0.04, dearer) == pytest.approx([0, 0.2])
    assert path.at(0.02, dearer) == pytest.approx([0, 0.1])
    assert path.at(0.09, dearer) == pytest.approx([0.0625, 0.2])
    assert path.at(0.995, dearer) == pytest.approx([0.995, 0.995])


def test_greedy_shares_have_the_level_in_every_block(model, text):
    rule = criteria.rule("teal-greedy")
    fit = rule.calibrate(model, text, progress=False)
    shares = rule.shares(model, fit.state, 0.37)
    sizes = {place.key: place.module.weight.numel() for place in sited.block_linears(model)}
    for layer in range(4):
        here = [key for key in sizes if key[0] == layer]
        total = sum(sizes[key] for key in here)
        assert sum(shares[key] * sizes[key] for key in here) / total == pytest.approx(0.37)
    assert len({round(share, 3) for share in shares.values()}) > 4
    uniform = {key: 0.37 for key in shares}
    errors = {}
    layers = blocks(model)
    (sample,) = block_inputs(model, layers, [fit.state.sample])
    places = [place for place in sited.block_linears(model) if place.layer == 0]
    with torch.no_grad():
        error = rule.error(layers[0], 0, places, sample, fit.state)
        for name, chosen in (("greedy", shares), ("uniform", uniform)):
            errors[name] = error([chosen[place.key] for place in places])
    assert 0 < errors["greedy"] < errors["uniform"]


def test_low_rank_is_the_truncated_decomposition():
    for shape in ((7, 5), (5, 7)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        u, s, vh = torch.linalg.svd(weight)
        left, right = r_sparse.low_rank(weight, 3)
        torch.testing.assert_close(right @ left.t(), u[:, :3] @ torch.diag(s[:3]) @ vh[:3])


def test_r_sparse_by_hand():
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    left, right = r_sparse.low_rank(linear.weight, 1)  # keeps the entry 2 alone
    site = Site(0, "a", linear, sited.at_least(0.5), 2, dropped_output=r_sparse.through(left, right))
    attach(nn.Sequential(linear), [site])
    # kept (0, 3) meets W; dropped (0.3, 0) and (-0.2, 0.4) meet W of rank one
    x = torch.tensor([[0.3, 3.0], [-0.2, 0.4]])
    assert linear(x)[0].tolist() == pytest.approx([0.6, 3.0])
    assert linear(x)[1].tolist() == pytest.approx([-0.4, 0.0], abs=1e-6)


def test_r_sparse_spends_its_budget_where_the_error_is_least(model, text):
    up = model.model.layers[1].mlp.up_proj
    generator = torch.Generator().manual_seed(0)
    up.weight.data = torch.randn(80, 3, generator=generator) @ torch.randn(3, 32, generator=generator) / 7
    fit = criteria.rule("r-sparse").calibrate(model, text, progress=False)
    dense = logits(model)
    fit.apply(model, 0.4)
    sites = {(site.layer, site.name): site for site in attached(model)}
    assert sites[1, "mlp.up_proj"].weights_added == (80 + 32) * 3  # rank 3, split 0.7: no error
    x = torch.randn(9, 32, generator=generator)
    share = 0.4 + sites[1, "mlp.up_proj"].weights_added / up.weight.numel()
    large = (x * up.weight.norm(dim=0)).abs() >= fit.state.scores.at((1, "mlp.up_proj"), share)
    assert torch.equal(sites[1, "mlp.up_proj"].keep(x), large) and not large.all()
    spent = [site for site in sites.values() if site.weights_added]
    assert len(spent) < len(sites)
    with Masking(model) as masking, torch.no_grad():
        masking.begin("prefill", torch.ones_like(IDS, dtype=torch.bool))
        model(input_ids=IDS)
    found = masking.realised()["prefill"]["skipped_weights"]
    assert found / account(model).block_weights == pytest.approx(0.4, abs=0.03)
    assert not torch.equal(logits(model), dense)


def test_the_mode_is_where_values_are_densest():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([
        torch.randn(20_000, generator=generator) * 0.1 - 1.5,
        torch.randn(10_000, generator=generator) * 2 + 4,
        torch.tensor([1e5]),
    ])  # fmt: skip
    assert scap.mode(values) == pytest.approx(-1.5, abs=0.02)
    assert scap.mode(torch.full((50,), 3.0)) == 3.0


def test_scap_by_hand():
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = WEIGHT
    keep = sited.at_least(0.5, 1.0)
    attach(nn.Sequential(linear), [Site(0, "up", linear, keep, 2, fill=1.0)])
    # within 0.5 of the mode 1 are 1.2 and 0.6: (1, -2, 1, 3) times the weights
    assert linear(torch.tensor([[1.2, -2.0, 0.6, 3.0]])).tolist() == [pytest.approx([4.0, 3.5])]


def test_scap_centres_on_the_mode(model, text):
    rule = criteria.rule("scap")
    fit = rule.calibrate(model, text, progress=False)
    assert set(fit.state.modes) == {(layer, kind) for layer in range(4) for kind in ("input", "down")}
    fit.state.modes[1, "down"] = 0.75
    fit.apply(model, 0.4)
    _, _, h = gate_of(model, layer=1)
    site = next(site for site in attached(model) if (site.layer, site.name) == (1, "down"))
    assert site.fill == 0.75 and float((h == 0.75).float().mean()) > 0.01
    shape = account(model)
    assert rule.sparsity_for(shape, 0.3) == pytest.approx(0.3 * shape.block_weights / shape.mlp_weights)

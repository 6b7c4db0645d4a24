"""Rules of other papers: hand-computed examples, model-level sparsity, and that they leave no trace."""

import evaluation_toys
import pytest
import torch
import toys
from torch import nn

from cats import criteria
from cats.core.accounting import account
from cats.corpora import corpus as corpora
from cats.criteria import (
    centred,
    greedy,
    griffin,
    r_sparse,
    scap,
    sirius,
    sited,
    statistical_magnitude,
    statistical_top_k,
)
from cats.criteria.generate import continue_prompts
from cats.criteria.masking import Masking, Policy
from cats.criteria.pruning import block_inputs, blocks
from cats.criteria.sites import Call, Site, attach, attached, detach
from cats.errors import CatsError
from cats.evaluation import plan as plans
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.method import Calibration, Method
from cats.evaluation.table import load_results, results_table, write_records

RIVALS = [name for name, rule in criteria.RULES.items() if isinstance(rule, sited.SitedRule)]
IDS = toys.tokens(4, 48, seed=9)


@pytest.fixture
def model():
    return toys.toy("llama", num_hidden_layers=4)


@pytest.fixture
def text():
    return toys.batches(6)


def logits(model, ids=IDS):
    with Masking(model) as masking, torch.no_grad():
        masking.begin("prefill", torch.ones_like(ids, dtype=torch.bool))
        return model(input_ids=ids).logits


def skipped_by_hand(model, run):
    """Share of the blocks' weights that zeros in the inputs of linear layers save, and of tokens."""
    saved, tokens = [], []

    def see(module, args, output):
        x = args[0].reshape(-1, args[0].shape[-1])
        saved.append(int((x == 0).sum()) * module.out_features)
        tokens.append(len(x))

    # a forward hook sees what the forward got: inputs behind the pre-hooks that drop
    places = sited.linears(model)
    hooks = [place.linear.register_forward_hook(see) for place in places]
    run()
    for hook in hooks:
        hook.remove()
    return sum(saved) / tokens[0] / account(model).block_weights


def one(rule, weight, x, share, quantiles=None):
    """What one Linear [n, k] makes of x [N, k] under a rule of inputs."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    place = sited.Place(0, "mlp.gate_proj", linear)
    state = {place.key: criteria.rule(rule).norms(place)} if quantiles is None else quantiles
    keep = criteria.rule(rule).keep(place, state, share)
    return torch.where(keep(x, None), x, 0.0)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("target", [0.33])
def test_the_calibration_text_realises_the_model_level_target(name, target, model, text):
    rule, shape = criteria.rule(name), account(model)
    own = rule.own_sparsity(shape, target)
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


# where the realised share is not near the target by construction: how far from what
TOLERANCES = {
    # random pre-activations are nearly Gaussian
    "statistical-top-k": lambda target: (0.05, target),
    # half of a text is its prompt, read dense
    "griffin": lambda target: (0.03, target / 2),
}


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


def test_sites_count_what_inputs_lose(model, text):
    fit = criteria.rule("teal").calibrate(model, text, progress=False)
    fit.apply(model, 0.4)
    with Masking(model) as masking, torch.no_grad():
        by_hand = skipped_by_hand(model, lambda: model(input_ids=IDS))
    found = masking.realised()["prefill"]
    assert found["gate_sparsity"] is None
    assert found["skipped_weights"] / account(model).block_weights == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize("policy, dense", [
    (Policy(prefill="dense"), slice(None)),
    (Policy(first_token="dense"), slice(0, 1)),
    (Policy(last_share=0.25), slice(0, 36)),
])  # fmt: skip
def test_policies_leave_tokens_alone(policy, dense, model, text):
    fit = criteria.rule("teal").calibrate(model, text, progress=False)
    seen = {}
    linear = model.model.layers[0].self_attn.q_proj
    linear.register_forward_hook(lambda module, args, output: seen.update(x=args[0]))
    fit.apply(model, 0.5)
    with Masking(model, policy) as masking, torch.no_grad():
        model(input_ids=IDS)
    zeros = (seen["x"] == 0).float().mean((0, 2))
    assert (zeros[dense] == 0).all()
    rest = torch.ones(48, dtype=torch.bool)
    rest[dense] = False
    assert (zeros[rest] > 0.2).all()
    skipped = masking.realised()["prefill"]["skipped_weights"]
    assert skipped / account(model).block_weights == pytest.approx(0.5 * float(rest.float().mean()), abs=0.05)


def test_decoding_counts_rows_by_their_length(model, text):
    criteria.rule("teal").calibrate(model, text, progress=False).apply(model, 0.5)
    with Masking(model) as masking:
        masking.start_rows()
        for step in range(3):
            masking.begin("decode", torch.ones(4, 1, dtype=torch.bool))
            model(input_ids=IDS[:, step : step + 1])
        masking.count_rows(torch.tensor([1, 3, 0, 2]))
    assert masking.realised()["decode"]["tokens"] == 6


@pytest.mark.parametrize("name", ["cats", "griffin"])
def test_rows_that_are_over_leave_and_the_others_go_on_as_alone(name, model, text):
    criteria.rule(name).calibrate(model, text, progress=False).apply(model, 0.7)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 90, (8 + 3 * row,), generator=generator).tolist() for row in range(8)]
    batches = []

    def ended(ids):  # rows end after 3 to 38 tokens, as their first one says
        limit = 3 + 7 * (ids[0] % 6)
        return limit if len(ids) >= limit else None

    def go_on(chosen):
        return continue_prompts(
            model, chosen, new_tokens=40, eos=[-1], ended=ended, masking=masking, prefill_tokens=64
        )

    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with Masking(model) as masking:
        together, counted = go_on(prompts), masking.realised()["decode"]
        assert len(set(map(len, together))) > 3 and batches[-1] < len(prompts) / 2
        masking.reset()
        assert together == [go_on([prompt])[0] for prompt in prompts]
        apart = masking.realised()["decode"]
    assert counted["tokens"] == apart["tokens"] == sum(len(row) - 1 for row in together)
    # a gate at its threshold may fall on the other side of it in another batch: one of 20,000 here
    assert counted["by_layer"] == pytest.approx(apart["by_layer"], abs=2e-3)
    assert counted["skipped_weights"] == pytest.approx(apart["skipped_weights"], rel=2e-3)


def test_two_at_once_are_refused(model, text):
    fit = criteria.rule("teal").calibrate(model, text, progress=False)
    fit.apply(model, 0.3)
    with pytest.raises(CatsError, match="undo that first"):
        fit.apply(model, 0.3)
    fit.undo(model)
    criteria.rule("cats").calibrate(model, text, progress=False).apply(model, 0.3)
    with pytest.raises(CatsError, match="sparse already"):
        fit.apply(model, 0.3)
    with pytest.raises(CatsError, match="outside"):
        fit.apply(model, 1.0)


def test_model_levels_out_of_reach_say_so(model):
    shape = account(model)
    assert criteria.rule("cats").own_sparsity(shape, 0.3) == pytest.approx(0.3 / shape.max_model_sparsity)
    with pytest.raises(CatsError, match=r"cats cannot reach a model-level sparsity of 90\.0%"):
        criteria.rule("cats").own_sparsity(shape, 0.9)
    assert criteria.rule("wanda").own_sparsity(shape, 0.4) == 0.4
    with pytest.raises(CatsError, match="no sparsity of choice"):
        criteria.rule("relufication").own_sparsity(shape, 0.4)


def test_a_site_fills_and_adds():
    linear = nn.Linear(3, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    model = nn.Sequential(linear)
    x = torch.tensor([[0.5, -2.0, 0.1]])
    site = Site(0, "a", linear, sited.at_least(0.3), 2, fill=0.2, rest=lambda dropped: 10 * dropped[:, 1:])
    attach(model, [site])
    # 0.1 becomes 0.2: (0.5 - 4 + 0.6, -2 - 0.2); of the dropped (0, 0, -0.1) the last two are added tenfold
    assert model(x).tolist() == [pytest.approx([-2.9, -3.2])]
    detach(model)
    attach(model, [Site(0, "a", linear, sited.at_least(3.0), 2, at="output", start=1, width=1)])
    assert model(x).tolist() == [pytest.approx([-3.2, 0.0])]


def test_teal_by_hand():
    found = sited.Quantiles()
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


WEIGHT = torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 1.0, 0.0, 0.5]])  # columns of norm 5, 1, 1, 0.5


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
        place = sited.Place(0, name, linear)
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
    sizes = {place.key: place.linear.weight.numel() for place in sited.linears(model)}
    for layer in range(4):
        here = [key for key in sizes if key[0] == layer]
        total = sum(sizes[key] for key in here)
        assert sum(shares[key] * sizes[key] for key in here) / total == pytest.approx(0.37)
    assert len({round(share, 3) for share in shares.values()}) > 4
    uniform = {key: 0.37 for key in shares}
    errors = {}
    layers = blocks(model)
    (sample,) = block_inputs(model, layers, [fit.state.sample])
    places = [place for place in sited.linears(model) if place.layer == 0]
    with torch.no_grad():
        error = rule._error(layers[0], 0, places, sample, fit.state)
        for name, chosen in (("greedy", shares), ("uniform", uniform)):
            errors[name] = error([chosen[place.key] for place in places])
    assert 0 < errors["greedy"] < errors["uniform"]


def gate_of(model, layer=1):
    """z = SiLU(x W_gate) and x W_up of a layer, and the output of the MLP, as the model runs on IDS."""
    mlp = model.model.layers[layer].mlp
    seen = {}
    hooks = [
        getattr(mlp, name).register_forward_hook(lambda module, args, out, n=name: seen.update({n: out}))
        for name in ("gate_proj", "up_proj")
    ]
    hooks.append(mlp.down_proj.register_forward_hook(lambda module, args, out: seen.update(h=args[0])))
    logits(model)
    for hook in hooks:
        hook.remove()
    return nn.functional.silu(seen["gate_proj"]), seen["up_proj"], seen["h"]


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


@pytest.mark.parametrize("with_centre", [True, False])
def test_centred_neurons_leave_a_linear_map_and_what_differs_from_it(with_centre, model, text):
    rule = criteria.rule("centred")
    state = rule.calibrate(model, text, progress=False).state
    mlp, x = model.model.layers[1].mlp, torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        z, centre = nn.functional.silu(gate), nn.functional.silu(state.gates[1]) * with_centre
        whole = mlp.up_proj.weight.t() @ (centre[:, None] * mlp.down_proj.weight.t())  # A [d, d]
        distance = (z - centre).abs() * state.weights[1]
        share = 0.5 + with_centre * 32 / (2 * 80)  # A is paid for
        kept = torch.where(distance >= state.scores.at((1, with_centre), share), z - centre, 0.0)
        expected = x @ whole + mlp.down_proj(kept * up)
        site = rule.of(sited.parts(model)[1][0], mlp.gate_proj, state, 0.5, with_centre)
        site.attach()
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-6)
        assert 0.1 < (kept != 0).float().mean() < 0.6
    assert site.extra == with_centre * 32 * 32


def test_a_layer_has_centres_where_they_are_nearer_to_the_dense_one(model, text):
    rule = criteria.rule("centred")
    fit = rule.calibrate(model, text, progress=False)
    mlp, x = model.model.layers[2].mlp, fit.state.inputs[2]
    errors = []
    with torch.no_grad():
        wanted = mlp(x)
        for with_centre in (False, True):
            site = rule.of(sited.parts(model)[2][0], mlp.gate_proj, fit.state, 0.5, with_centre)
            site.attach()
            errors.append(float(((mlp(x) - wanted).norm(dim=-1) / wanted.norm(dim=-1)).pow(2).mean()))
            site.detach()
    fit.apply(model, 0.5)
    assert bool(attached(model)[2].extra) == (errors[1] < errors[0])


def test_centres_are_medians_and_weights_sizes_of_up(model, text):
    state = criteria.rule("centred").calibrate(model, text, progress=False).state
    seen = {"gate_proj": [], "up_proj": []}
    hooks = [
        getattr(model.model.layers[2].mlp, name).register_forward_hook(
            lambda module, args, out, name=name: seen[name].append(out)
        )
        for name in seen
    ]
    with torch.no_grad():
        for batch in text:
            model(**batch)
    for hook in hooks:
        hook.remove()
    valid = torch.cat([batch["attention_mask"].bool() for batch in text])
    gate, up = (torch.cat(seen[name])[valid] for name in ("gate_proj", "up_proj"))
    assert len(gate) < 2 * centred._MEDIANS, "all of so short a text is in the sample"
    assert torch.equal(state.gates[2], gate.median(0).values)
    torch.testing.assert_close(state.weights[2], up.pow(2).mean(0).sqrt())


def test_a_sample_is_evenly_spaced():
    sample = centred._Sample(512)
    for begin in range(0, 5000, 130):
        sample.see(torch.arange(begin, begin + 130)[:, None])
    rows = sample.rows[:, 0]
    assert 512 <= len(rows) < 1024
    assert rows[0] == 0 and (rows.diff() == rows[1]).all() and rows[-1] > 5000 - rows[1]


def test_a_matrix_that_takes_all_neurons_is_left_out(model, text):
    fit = criteria.rule("centred").calibrate(model, text[:1], progress=False)
    fit.apply(model, 0.99)
    assert {site.extra for site in attached(model)} == {0}
    fit.undo(model)
    before = logits(model)
    assert torch.equal(logits(fit.apply(model, 0.0)), before)


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
    assert rule.own_sparsity(shape, 0.3) == pytest.approx(0.3 * shape.block_weights / shape.mlp_weights)


def test_statistical_top_k_by_hand():
    keep = statistical_top_k._keep(0.5)
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-8.0, 0.0, 0.0, 0.0]])  # means 1.5 and -2
    assert keep(x).tolist() == [[False, False, True, True], [False, True, True, True]]
    keep = statistical_top_k._keep(0.8413448)  # one standard deviation, 1.118, above the mean
    assert keep(x[:1]).tolist() == [[False, False, False, True]]
    assert statistical_top_k._keep(0.0)(x).all()


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
    site = Site(0, "a", linear, sited.at_least(0.5), 2, rest=r_sparse._through(left, right))
    attach(nn.Sequential(linear), [site])
    # kept (0, 3) meets W; dropped (0.3, 0) and (-0.2, 0.4) meet W of rank one
    x = torch.tensor([[0.3, 3.0], [-0.2, 0.4]])
    assert linear(x)[0].tolist() == pytest.approx([0.6, 3.0])
    assert linear(x)[1].tolist() == pytest.approx([-0.4, 0.0], abs=1e-6)


def test_r_sparse_spends_its_budget_where_the_error_is_least(model, text):
    up = model.model.layers[1].mlp.up_proj
    generator = torch.Generator().manual_seed(0)
    up.weight.data = torch.randn(80, 1, generator=generator) @ torch.randn(1, 32, generator=generator) / 4
    fit = criteria.rule("r-sparse").calibrate(model, text, progress=False)
    dense = logits(model)
    fit.apply(model, 0.4)
    sites = {(site.layer, site.name): site for site in attached(model)}
    assert sites[1, "mlp.up_proj"].extra == (80 + 32) * 2  # rank 2 of the split 0.8: the error is zero
    x = torch.randn(9, 32, generator=generator)
    share = 0.4 + sites[1, "mlp.up_proj"].extra / up.weight.numel()
    large = (x * up.weight.norm(dim=0)).abs() >= fit.state.scores.at((1, "mlp.up_proj"), share)
    assert torch.equal(sites[1, "mlp.up_proj"].keep(x), large) and not large.all()
    spent = [site for site in sites.values() if site.extra]
    assert len(spent) < len(sites)
    with Masking(model) as masking, torch.no_grad():
        masking.begin("prefill", torch.ones_like(IDS, dtype=torch.bool))
        model(input_ids=IDS)
    found = masking.realised()["prefill"]["skipped_weights"]
    assert found / account(model).block_weights == pytest.approx(0.4, abs=0.03)
    assert not torch.equal(logits(model), dense)


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
        assert masking.whole
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


PROMPTS = [[5, 9, 33, 70], [8, 8, 21, 90, 14, 101, 3], [60, 61]]
DENSE_PROMPT = Policy(prefill="dense")  # as Sirius reads it: the first token is the dense model's too


@pytest.mark.parametrize("likelihood", [0.0, 1.01])
def test_sirius_that_never_or_always_corrects(likelihood, model, text, monkeypatch):
    fit = criteria.rule("sirius").calibrate(model, text, progress=False)
    dense, _ = continued(model, criteria.Fit("dense", None), 0.0)
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
    own = rule.own_sparsity(shape, 0.25)
    fit = sirius.SiriusFit("sirius", None)
    assert own == pytest.approx(0.25 * 16 / 15 / shape.max_model_sparsity)
    assert fit.model_sparsity(shape, own) == pytest.approx(0.25)
    weights = shape.block_weights + shape.head_weights
    expected = 2 * (15 * (weights - own * shape.skippable_weights) + weights) / 16
    assert fit.bytes_per_token(shape, own) == pytest.approx(expected)
    with pytest.raises(CatsError, match="sliding windows"):
        continued(toys.toy("gemma3"), fit, 0.5)


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


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    return evaluation_toys.mirrors(tmp_path_factory.mktemp("mirrors"))


def test_a_suite_compares_rules_at_one_model_level(mirrors, tmp_path):
    loaded = evaluation_toys.loaded()
    evaluator = Evaluator(
        loaded,
        tmp_path,
        data_dir=str(mirrors),
        calibration=Calibration("python-docs", tokens=2048, sequence_length=128),
        documents=2,
    )
    rules = ("cats", "teal", "wina", "griffin", "sirius")
    wanted = [Method(), *(Method(name, 0.2, level="model") for name in rules)]
    found = load_results(evaluator.run(["piqa", "wikitext"], wanted, progress=False))
    generating = [each for each in wanted if each.rule in ("griffin", "sirius")]
    found += load_results(evaluator.run(["gsm8k"], generating, progress=False))
    assert len(found) == 2 * len(wanted) + 2 and not attached(loaded.model)
    rows = results_table(found).set_index(["rule", "experiment"])
    shape = account(loaded.model)
    weights = 2 * (shape.block_weights + shape.head_weights)
    for name in rules:
        row = rows.loc[name, "zero_shot"]
        assert row.model_sparsity == pytest.approx(0.2)
        if name != "sirius":
            assert row.bytes_per_token == pytest.approx(weights - 0.2 * 2 * shape.block_weights)
    assert rows.loc["wina", "zero_shot"].realised_model_sparsity == pytest.approx(0.2, abs=0.01)
    assert rows.loc["teal", "zero_shot"].realised_sparsity != rows.loc["teal", "zero_shot"].realised_sparsity
    assert rows.loc["cats", "zero_shot"].gate_sparsity == pytest.approx(0.2 / shape.max_model_sparsity)
    griffin_at_decode = found[-2].sparsity
    share = griffin_at_decode["realised"]["decode"]["skipped_weights"] / shape.block_weights
    assert share == pytest.approx(0.2, abs=0.01)
    assert griffin_at_decode["realised"]["prefill"]["skipped_weights"] == 0
    corrected = rows.loc["sirius", "generation"]
    assert 1 / 16 <= corrected.dense_steps_per_token <= 1
    assert corrected.sparse_steps_per_token == pytest.approx(15 * corrected.dense_steps_per_token)
    written = write_records(found, "toy", parameters={}, started=0.0, folder=tmp_path)
    assert len(written) == 3
    again = evaluator.run(["piqa"], [Method("teal", 0.2)], progress=False)
    assert again[0].name not in {path.name for path in evaluator.run(["piqa"], wanted, progress=False)}


def test_a_level_out_of_reach_is_refused_before_anything_runs(mirrors, tmp_path):
    evaluator = Evaluator(evaluation_toys.loaded(), tmp_path, data_dir=str(mirrors))
    with pytest.raises(CatsError, match="cannot reach a model-level"):
        evaluator.run(["piqa"], [Method("cats", 0.8, level="model")])
    with pytest.raises(CatsError, match="rule or model"):
        Method("cats", 0.5, level="block")


def test_plans_cross_policies_and_say_the_level(tmp_path):
    path = tmp_path / "plan.yml"
    path.write_text(
        "runs: [{model: smollm2-135m-instruct, record: r, tasks: [piqa], level: model, "
        "policies: [{}, {first_token: dense}], rules: [dense, teal: [0.25, 0.4]], "
        "calibration: {rows: 8, padding: counted, batch_size: 2}}]"
    )
    (run,) = plans.read(path)
    assert run.methods == [
        Method(),
        *(Method("teal", level, Policy(), "model") for level in (0.25, 0.4)),
        *(Method("teal", level, Policy(first_token="dense"), "model") for level in (0.25, 0.4)),
    ]
    assert "under 2 policies" in str(run)
    path.write_text(path.read_text().replace("counted", "padded"))
    with pytest.raises(CatsError, match="padding='padded' is unknown"):
        plans.read(path)


def test_counted_padding_is_text_to_the_calibration_alone(monkeypatch):
    tokenizer = evaluation_toys.tokenizer()
    documents = ["a cat sat", "a cat sat on a mat and saw two birds fly", "it"]
    info = {"name": "toy", "split": "train"}
    corpus = corpora.Corpus("toy", "train", documents, info)
    monkeypatch.setattr(corpora, "load", lambda name, split: corpus)
    kept = Calibration("toy", rows=3, batch_size=3).batches(tokenizer, "cpu")
    counted = Calibration("toy", rows=3, batch_size=3, padding="counted").batches(tokenizer, "cpu")
    assert torch.equal(kept[0]["input_ids"], counted[0]["input_ids"])
    assert int(kept[0]["attention_mask"].sum()) == sum(map(len, documents))
    assert counted[0]["attention_mask"].all() and counted[0]["attention_mask"].shape == (3, 40)
    assert counted.info["padding"] == "right, counted"
    assert Calibration().describe() == {
        "corpus": "python-docs",
        "split": "train",
        "tokens": 60_000,
        "sequence_length": 512,
        "seed": 0,
    }

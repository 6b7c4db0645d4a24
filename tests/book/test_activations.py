import pytest
import torch
import toys

from cats.book.analysis import reference_code
from cats.book.analysis.activations import Draws, exchange, first_token, measure, padding
from cats.core.structure import find_gated_mlps
from cats.errors import CatsError


@pytest.fixture(scope="module")
def measured():
    """A toy model's distribution by first and other tokens, and its activations by layer and group."""
    model = toys.toy("llama")
    batches = toys.batches()
    held = [{"first": [], "rest": [], "padding": []} for _ in find_gated_mlps(model)]
    hooks = []
    for layer, mlp in enumerate(find_gated_mlps(model)):

        def keep(module, inputs, z, layer=layer):
            held[layer]["all"] = z.detach()

        hooks.append(mlp.module.act_fn.register_forward_hook(keep))
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        mask = batch["attention_mask"].bool()
        position = torch.arange(mask.shape[1]).expand(mask.shape)
        for groups in held:
            groups["first"].append(groups["all"][mask & (position == 0)])
            groups["rest"].append(groups["all"][mask & (position > 0)])
            groups["padding"].append(groups["all"][~mask])
    for hook in hooks:
        hook.remove()
    z = [{name: torch.cat(groups[name]) for name in ("first", "rest", "padding")} for groups in held]
    return measure(model, batches, groups=("first", "rest"), label=first_token), z, model, batches


def test_every_activation_of_a_token_is_counted_once_and_padding_never(measured):
    distribution, z, _, batches = measured
    valid = sum(int(batch["attention_mask"].sum()) for batch in batches)
    rows = sum(len(batch["attention_mask"]) for batch in batches)
    assert distribution.tokens.tolist() == [rows, valid - rows]
    for layer, groups in enumerate(z):
        for number, name in enumerate(("first", "rest")):
            assert int(distribution.magnitudes[layer, number].sum()) == groups[name].numel()
            assert int(distribution.signed[layer, number].sum()) == groups[name].numel()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("groups", [("first",), ("rest",), ()])
def test_thresholds_are_quantiles_of_the_magnitudes_of_their_groups(measured, sparsity, groups):
    distribution, z, _, _ = measured
    thresholds = distribution.thresholds(sparsity, *groups)
    for layer, held in enumerate(z):
        values = torch.cat([held[name] for name in groups or ("first", "rest")]).abs().flatten()
        share = float((values < thresholds[layer]).double().mean())
        assert share == pytest.approx(sparsity, abs=2e-3)
        assert float(distribution.share_below(thresholds, *groups)[layer]) == pytest.approx(share, abs=2e-3)


def test_extent_energy_and_sign_agree_with_the_activations(measured):
    distribution, z, _, _ = measured
    thresholds = distribution.thresholds(0.7, "rest")
    for layer, held in enumerate(z):
        values = held["rest"].double()
        assert float(distribution.largest("rest")[layer]) == pytest.approx(
            float(values.abs().max()), rel=2e-3
        )
        below = values[values.abs() < thresholds[layer]].square().sum() / values.square().sum()
        assert float(distribution.energy_below(thresholds, "rest")[layer]) == pytest.approx(
            float(below), abs=4e-3
        )
        negative = float((values < 0).double().mean())
        assert float(distribution.negative_share("rest")[layer]) == pytest.approx(negative, abs=5e-3)


@pytest.mark.parametrize("merge", [1, 5, 13])
def test_density_integrates_to_the_share_between_minus_one_and_one(measured, merge):
    distribution, z, _, _ = measured
    centres, density = distribution.density(1, merge=merge)
    values = torch.cat([z[1]["first"], z[1]["rest"]])
    width = merge * reference_code.WIDTH
    half = len(centres) * width / 2
    assert float(centres.sum()) == pytest.approx(0, abs=1e-9)
    assert float(density.sum() * width) == pytest.approx(
        float((values.abs() < half).double().mean()), abs=5e-3
    )


def test_padding_can_be_told_from_text(measured):
    _, z, model, batches = measured
    both = measure(model, batches, groups=("text", "padding"), label=padding)
    assert int(both.tokens[1]) == len(z[0]["padding"])
    assert int(both.magnitudes[0, 1].sum()) == z[0]["padding"].numel()


def test_the_model_is_left_dense(measured):
    _, _, model, _ = measured
    assert not any(type(module).__name__ == "CatsMLP" for module in model.modules())


def test_an_unknown_group_and_no_tokens_are_clear_errors(measured):
    distribution, _, model, batches = measured
    with pytest.raises(CatsError, match="There is no group 'second'"):
        distribution.thresholds(0.5, "second")
    with pytest.raises(CatsError, match="No token was counted"):
        measure(model, batches, label=lambda mask: torch.full_like(mask, -1))


def test_draws_are_disjoint_seeded_and_of_the_sizes_asked():
    masks = [torch.ones(4, 3, dtype=torch.int64) for _ in range(8)]
    draws = Draws(30, [2, 5], 3, seed=0)
    labels = torch.cat([draws(mask) for mask in masks])
    per_row = labels[:, 0]
    assert torch.equal(labels, per_row[:, None].expand(-1, 3))
    assert [int((per_row == number).sum()) for number in range(7)] == [2, 2, 2, 5, 5, 5, 9]
    assert per_row[30:].tolist() == [-1, -1]
    assert draws.groups[3] == Draws.name(5, 1) and draws.groups[-1] == "others"
    same, other = (Draws(30, [2, 5], 3, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.cat([same(mask) for mask in masks]), labels)
    assert not torch.equal(torch.cat([other(mask) for mask in masks]), labels)


def test_draws_that_need_more_rows_than_there_are_are_refused():
    with pytest.raises(CatsError, match="need 330 rows, not 300"):
        Draws(300, [10, 100], 3, seed=0)


def test_reference_edges_are_those_of_the_description():
    edges = reference_code.edges()
    assert len(edges) == 1000 and edges[0] == -torch.inf and edges[-1] == torch.inf
    assert edges[1] == -1 and edges[998] == 1
    assert float(edges[2] - edges[1]) == pytest.approx(0.002006, abs=1e-6)


def test_reference_threshold_is_the_left_edge_of_the_first_bin_past_the_share():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3
    signed = torch.zeros(reference_code.BINS, dtype=torch.int64)
    reference_code.count(signed, values)
    folded = reference_code.fold(signed)
    edges = reference_code.edges()
    expected = torch.bincount(torch.bucketize(values.abs(), edges, right=True) - 1, minlength=999)
    assert int(folded.sum()) == len(values) and int((folded - expected).abs().max()) <= 2
    for sparsity in (0.1, 0.5, 0.9, 0.999):
        threshold = float(reference_code.thresholds(folded, sparsity))
        exact = float(values.abs().quantile(sparsity))
        if exact < 1:
            assert 0 <= exact - threshold <= reference_code.WIDTH + 1e-9
        else:
            assert threshold == 1.0


def test_reference_counts_survive_what_is_not_finite():
    signed = torch.zeros(reference_code.BINS, dtype=torch.int64)
    reference_code.count(signed, torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.0, -3.0]))
    assert signed[-1] == 3 and signed[0] == 2 and signed[reference_code.BINS // 2] == 1


def test_errors_of_draws_are_shares_minus_targets(measured):
    _, _, model, batches = measured
    draws = Draws(12, [2], 2, seed=0)
    drawn = measure(model, batches, groups=draws.groups, label=draws)
    errors = draws.errors(drawn, drawn, [0.5, 0.9])
    assert set(zip(errors.rows, errors.draw, strict=True)) == {(2, 1), (2, 2), (12, 1)}
    assert len(errors) == 2 * 3 * 3
    whole = errors[errors.rows == 12].error
    assert float(whole.abs().max()) < 2e-3, "on the rows that it was made from, a quantile is exact"
    row = errors[(errors.sparsity == 0.9) & (errors.draw == 2) & (errors.layer == 1)].iloc[0]
    thresholds = drawn.thresholds(0.9, Draws.name(2, 2))
    assert row.error == pytest.approx(float(drawn.share_below(thresholds)[1]) - 0.9)


def test_exchange_meets_the_target_on_its_diagonal(measured):
    distribution, _, model, batches = measured
    other = measure(model, batches[:1])
    table = exchange({"a": distribution, "b": other}, 0.5)
    assert list(table.columns) == ["thresholds from", "on a", "on b"]
    assert table["on a"][0].startswith("50.0% (") and table["on b"][1].startswith(
        ("50.0% (", "49.9% (", "50.1% (")
    )

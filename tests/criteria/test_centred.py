"""The rule `centred`: what its neurons leave, where layers have centres, and its samples."""

import pytest
import torch
from rule_toys import logits
from torch import nn

from cats import criteria
from cats.calibration import centred
from cats.core.structure import find_gated_mlps
from cats.criteria.sites import attached


@pytest.mark.parametrize("with_centre", [True, False])
def test_centred_neurons_leave_a_linear_map_and_what_differs_from_it(with_centre, model, text):
    rule = criteria.rule("centred")
    state = rule.calibrate(model, text, progress=False).state
    mlp, x = model.model.layers[1].mlp, torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        z, centre = nn.functional.silu(gate), nn.functional.silu(state.centres.gates[1]) * with_centre
        whole = mlp.up_proj.weight.t() @ (centre[:, None] * mlp.down_proj.weight.t())  # A [d, d]
        distance = (z - centre).abs() * state.centres.weights[1]
        values = (state.centres.values if with_centre else state.values)[1]
        share = 0.5 + with_centre * 32 / (2 * 80)  # A is paid for: 0.5 and 0.7 are in the grid
        score = values[(state.grid - share).abs().argmin()]
        kept = torch.where(distance >= score, z - centre, 0.0)
        expected = x @ whole + mlp.down_proj(kept * up)
        site = rule.site(find_gated_mlps(model)[1], state, 0.5, centred=with_centre)
        site.attach()
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-6)
        assert 0.1 < (kept != 0).float().mean() < 0.6
    assert site.weights_added == with_centre * 32 * 32


def sampled_inputs(model, text):
    """What layer 2 reads of the text, thinned as the calibration's sample is."""
    seen = []
    hook = model.model.layers[2].mlp.gate_proj.register_forward_hook(
        lambda module, args, out: seen.append(args[0])
    )
    sample = centred.Sample(centred.INPUTS, 32, torch.float32)
    with torch.no_grad():
        for batch in text:
            model(**batch)
            sample.see(seen.pop()[batch["attention_mask"].bool()])
    hook.remove()
    return sample.rows


def test_a_layer_has_centres_where_they_are_nearer_to_the_dense_one(model, text):
    rule = criteria.rule("centred")
    fit = rule.calibrate(model, text, progress=False)
    mlp, x = model.model.layers[2].mlp, sampled_inputs(model, text)
    errors = []
    with torch.no_grad():
        wanted = mlp(x)
        for with_centre in (False, True):
            site = rule.site(find_gated_mlps(model)[2], fit.state, 0.5, centred=with_centre)
            site.attach()
            errors.append(float(((mlp(x) - wanted).norm(dim=-1) / wanted.norm(dim=-1)).pow(2).mean()))
            site.detach()
    fit.apply(model, 0.5)
    assert bool(attached(model)[2].weights_added) == (errors[1] < errors[0])


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
    assert len(gate) < 2 * centred.MEDIANS, "all of so short a text is in the sample"
    assert torch.equal(state.centres.gates[2], gate.median(0).values.half().float())
    rms = up.pow(2).mean(0).sqrt()
    torch.testing.assert_close(state.centres.weights[2], rms / rms.mean(), rtol=1e-3, atol=1e-4)


def test_a_sample_is_evenly_spaced():
    sample = centred.Sample(512, 1, torch.int64)
    for begin in range(0, 5000, 130):
        sample.see(torch.arange(begin, begin + 130)[:, None])
    rows = sample.rows[:, 0]
    assert 512 <= len(rows) < 1024
    assert rows[0] == 0 and (rows.diff() == rows[1]).all() and rows[-1] > 5000 - rows[1]


def test_a_matrix_that_takes_all_neurons_is_left_out(model, text):
    fit = criteria.rule("centred").calibrate(model, text[:1], progress=False)
    fit.apply(model, 0.99)
    assert {site.weights_added for site in attached(model)} == {0}
    fit.undo(model)
    before = logits(model)
    assert torch.equal(logits(fit.apply(model, 0.0)), before)

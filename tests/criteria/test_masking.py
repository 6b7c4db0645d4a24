"""Masking of sites: policies, what is counted, and rows that leave a batch."""

import pytest
import torch
from rule_toys import IDS
from torch import nn

from cats import criteria
from cats.core.accounting import account
from cats.criteria import (
    sited,
)
from cats.criteria.generate import continue_prompts
from cats.criteria.masking import Masking, Policy
from cats.criteria.sites import Site, attach, detach
from cats.errors import CatsError


def skipped_by_hand(model, run):
    """Share of the blocks' weights that zeros in the inputs of linear layers save, and of tokens."""
    saved, tokens = [], []

    def see(module, args, output):
        x = args[0].reshape(-1, args[0].shape[-1])
        saved.append(int((x == 0).sum()) * module.out_features)
        tokens.append(len(x))

    # a forward hook sees what the forward got: inputs behind the pre-hooks that drop
    places = sited.block_linears(model)
    hooks = [place.module.register_forward_hook(see) for place in places]
    run()
    for hook in hooks:
        hook.remove()
    return sum(saved) / tokens[0] / account(model).block_weights


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


def test_a_site_fills_and_adds():
    linear = nn.Linear(3, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    model = nn.Sequential(linear)
    x = torch.tensor([[0.5, -2.0, 0.1]])
    site = Site(0, "a", linear, sited.at_least(0.3), 2, fill=0.2, dropped_output=lambda x: 10 * x[:, 1:])
    attach(model, [site])
    # 0.1 becomes 0.2: (0.5 - 4 + 0.6, -2 - 0.2); of the dropped (0, 0, -0.1) the last two are added tenfold
    assert model(x).tolist() == [pytest.approx([-2.9, -3.2])]
    detach(model)
    attach(model, [Site(0, "a", linear, sited.at_least(3.0), 2, at="output", start=1, width=1)])
    assert model(x).tolist() == [pytest.approx([-3.2, 0.0])]

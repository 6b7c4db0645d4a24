"""`prefill="dense"`: prompts are dense whatever their length, what is decoded is masked, the rest refused."""

import copy

import pytest
import torch
from toys import batches, constant_thresholds, tokens, toy
from transformers import DynamicCache

from cats import CatsError, calibrate, cats_mlps, restore, sparsify

GREEDY = dict(max_new_tokens=16, do_sample=False, pad_token_id=0)


@pytest.fixture
def sparse():
    model = toy()
    return sparsify(model, calibrate(model, batches(), progress=False), 0.8, prefill="dense")


def by_hand(prompt, new: int):
    """Greedy tokens: the prompt goes through the dense model, each further token through the sparse one."""
    dense, masked = toy(), toy()
    sparsify(masked, calibrate(masked, batches(), progress=False), 0.8, prefill="masked")
    cache, ids = DynamicCache(config=dense.config), prompt
    with torch.no_grad():
        logits = dense(prompt, past_key_values=cache).logits
        for _ in range(new):
            token = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            logits = masked(token, past_key_values=cache).logits
    return ids


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_prompt_is_dense_and_what_follows_is_masked(sparse, length):
    prompt = tokens(rows=1, length=length)
    found = sparse.generate(prompt, **GREEDY, min_new_tokens=16, cache_implementation="dynamic")
    sparse.generation_config.eos_token_id = None
    assert torch.equal(sparse.generate(prompt, **GREEDY), by_hand(prompt, 16))
    assert found.shape == (1, length + 16)


def test_a_static_cache_gives_the_same(sparse):
    prompt = tokens(rows=1, length=7)
    options = GREEDY | {"disable_compile": True}
    expected = sparse.generate(prompt, **options)
    assert torch.equal(sparse.generate(prompt, cache_implementation="static", **options), expected)


def test_speculative_decoding_and_a_prompt_in_parts_are_refused(sparse):
    prompt = torch.cat([tokens(rows=1, length=6)] * 3, 1)
    with pytest.raises(CatsError, match="speculative decoding"):
        sparse.generate(prompt, prompt_lookup_num_tokens=4, **GREEDY)
    with pytest.raises(CatsError, match="later part of a prompt"):
        sparse.generate(prompt, prefill_chunk_size=5, **GREEDY)
    cache = sparse(prompt, use_cache=True).past_key_values
    with pytest.raises(CatsError, match="2 tokens on a cache that is not empty"):
        sparse(prompt[:, :2], past_key_values=cache)


def test_masked_prefill_takes_both(sparse):
    model = toy()
    sparsify(model, calibrate(model, batches(), progress=False), 0.8)
    prompt = torch.cat([tokens(rows=1, length=6)] * 3, 1)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=4, **GREEDY), expected)
    assert torch.equal(model.generate(prompt, prefill_chunk_size=5, **GREEDY), expected)


def test_the_watch_goes_with_copies_and_off_with_the_masks(sparse):
    prompt = tokens(rows=1, length=1)
    twin = copy.deepcopy(sparse)
    restore(sparse)
    torch.testing.assert_close(twin(prompt).logits, sparse(prompt).logits)  # one token, but a prompt
    sparsify(twin, constant_thresholds(twin), 0.5, prefill="masked")
    assert not torch.allclose(twin(prompt).logits, sparse(prompt).logits, atol=0.01)
    assert not twin.model._forward_pre_hooks and not sparse.model._forward_pre_hooks


def test_a_call_that_fails_leaves_nothing_behind(sparse):
    with pytest.raises(IndexError):
        sparse(torch.full((1, 3), 10**6), use_cache=True)
    assert {module.reading_prompt for module in cats_mlps(sparse)} == {None}

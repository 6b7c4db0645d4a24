"""The masked model answers as lm-eval's own does, in fewer and fuller calls."""

import numpy as np
import pytest
import torch
import toys
from evaluation_toys import KINDS, LENGTH, thin, tokenizer
from lm_eval.models.huggingface import HFLM

from cats.criteria.masking import Masking
from cats.evaluation.hflm import MaskedHFLM


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("name", KINDS)
def test_the_masked_model_scores_as_lm_eval_does(name, family, masked, loaded_tasks):
    model = toys.toy(family, max_position_embeddings=LENGTH)
    if masked:
        thin(model)
    requests, kind = loaded_tasks[name].requests[:16], KINDS[name]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=2)
    expected = getattr(theirs, kind)(requests, disable_tqdm=True)
    with Masking(model) as masking:
        ours = MaskedHFLM(model, tokenizer(), masking=masking, tokens=300)
        found = getattr(ours, kind)(requests, disable_tqdm=True)
    if kind == "generate_until":
        assert found == expected
    elif kind == "loglikelihood":
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=2e-3)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_context_is_read_once_for_all_its_continuations(loaded_tasks):
    model, requests = toys.toy("llama"), loaded_tasks["piqa"].requests
    lm = MaskedHFLM(model, tokenizer(), tokens=300)
    encoded = lm.encode(requests)
    lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    apart = sum(len(context) + len(continuation) - 1 for _, context, continuation in encoded)
    together = apart - sum(len(context) for _, context, _ in encoded) // 2
    assert lm.processed == together
    assert encoded[0][1] == tokenizer()(requests[0].args[0]).input_ids


def test_batches_hold_no_more_tokens_than_asked(loaded_tasks):
    lm = MaskedHFLM(toys.toy("llama"), tokenizer(), tokens=200)
    single, shared = lm._groups(lm.encode(loaded_tasks["arc_easy"].requests))
    for groups, together in ((single, False), (shared, True)):
        batches = list(lm._batches(groups, shared=together))
        assert sorted(id(group) for batch in batches for group in batch) == sorted(map(id, groups))
        for batch in batches:
            width = max(len(group.context) for group in batch) + max(group.longest for group in batch)
            assert len(batch) == 1 or width * len(batch) <= 200


def test_running_out_of_memory_halves_the_batch(loaded_tasks, monkeypatch):
    lm = MaskedHFLM(toys.toy("llama"), tokenizer(), tokens=4096)
    encoded = lm.encode(loaded_tasks["piqa"].requests)
    expected = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    real = lm._score_shared

    def scarce(batch):
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("no")
        return real(batch)

    monkeypatch.setattr(lm, "_score_shared", scarce)
    found = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-3)
    assert lm.tokens < 4096

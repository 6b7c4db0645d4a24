"""Which tokens a policy masks while a model is evaluated, and what is counted of them."""

import numpy as np
import pytest
import torch
import toys
from evaluation_toys import LENGTH, thin, tokenizer

from cats.calibration.observe import SparsityMeter
from cats.criteria.masking import Masking, Policy
from cats.errors import CatsError
from cats.evaluation.hflm import MaskedHFLM


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), None),
        (Policy(prefill="dense"), [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (Policy(first_token="dense"), [[0, 1, 1, 1], [0, 0, 1, 1]]),
        (Policy(last_share=0.5), [[0, 0, 1, 1], [0, 0, 1, 1]]),
        (Policy(first_token="dense", last_share=1.0), [[0, 1, 1, 1], [0, 0, 1, 1]]),
    ],
)
def test_policies_choose_tokens(policy, expected):
    valid = torch.tensor(
        [[1, 1, 1, 1], [0, 1, 1, 1]]
    ).bool()  # the second prompt has three tokens, padded left
    chosen = policy.chosen(valid)
    if expected is None:
        assert chosen is None
    else:
        assert (chosen & valid).int().tolist() == expected


def test_a_continuation_is_no_first_token():
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert Policy(first_token="dense").chosen(valid, before=torch.tensor([[5]])).all()


@pytest.mark.parametrize(
    "bad", [{"prefill": "no"}, {"first_token": "x"}, {"last_share": 0.0}, {"last_share": 1.5}]
)
def test_unknown_policies_are_refused(bad):
    with pytest.raises(CatsError):
        Policy(**bad)


def test_dense_prefill_scores_as_the_dense_model(loaded_tasks):
    model, requests = toys.toy("llama"), loaded_tasks["piqa"].requests
    dense = MaskedHFLM(model, tokenizer()).loglikelihood(requests, disable_tqdm=True)
    thin(model)
    with Masking(model, Policy(prefill="dense")) as masking:
        found = MaskedHFLM(model, tokenizer(), masking=masking).loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in dense], atol=1e-4)
    assert masking.realised()["prefill"]["gate_sparsity"] == 0


def test_realised_sparsity_is_that_of_the_meter(loaded_tasks):
    model = thin(toys.toy("llama"))
    requests = loaded_tasks["lambada_openai"].requests
    with Masking(model) as masking:
        lm = MaskedHFLM(model, tokenizer(), masking=masking, tokens=100)
        encoded = lm.encode(requests)
        lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    with SparsityMeter(model) as meter, torch.no_grad():
        for _, context, continuation in encoded:
            model(input_ids=torch.tensor([context + continuation[:-1]]))
    realised = masking.realised()["prefill"]
    assert realised["tokens"] == meter.tokens == lm.processed
    assert realised["gate_sparsity"] == pytest.approx(meter.overall, abs=1e-4)
    assert realised["by_layer"] == pytest.approx(meter.by_layer.tolist(), abs=1e-4)
    assert model.model.layers[0].mlp.combine is None


def test_generation_counts_each_rows_own_steps(loaded_tasks):
    model = thin(toys.toy("llama", max_position_embeddings=LENGTH))
    requests = loaded_tasks["gsm8k"].requests
    with Masking(model) as masking:
        lm = MaskedHFLM(model, tokenizer(), masking=masking)
        lm.generate_until(requests, disable_tqdm=True)
    realised = masking.realised()
    prompts = sum(len(lm.tok_encode(request.args[0])) for request in requests)
    new = lm.processed - realised["prefill"]["tokens"]
    assert realised["prefill"]["tokens"] == prompts
    assert realised["decode"]["tokens"] == new - len(requests)  # a prompt's reading gives its first token
    assert 0.05 < realised["decode"]["gate_sparsity"] < 0.95


def test_two_maskings_of_one_model_are_refused():
    model = thin(toys.toy("llama"))
    with Masking(model), pytest.raises(CatsError, match="another Masking"), Masking(model):
        pass

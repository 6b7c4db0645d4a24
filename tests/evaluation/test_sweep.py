import copy
from types import SimpleNamespace

import pytest
import torch
import toys

from cats import sparsify
from cats.calibration.calibrate import calibrate
from cats.errors import CatsError
from cats.evaluation.perplexity import document_nll
from cats.evaluation.sweep import sweep

TEXTS = ["a b c d e f", "c a b e d f g h", "h g f e", "b c", "d d a", "e a h", "g c b a", "f e d c b"]


class Letters:
    """A tokenizer of single letters, for a toy model's vocabulary."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return SimpleNamespace(input_ids=[3 + ord(letter) - ord("a") for letter in text.split()])


@pytest.fixture(scope="module")
def parts():
    model = toys.toy("llama")
    return model, calibrate(model, toys.batches())


def test_each_row_is_what_one_sparsity_scores_and_the_model_stays_dense(parts):
    model, thresholds = parts
    before = copy.deepcopy(model.state_dict())
    result = sweep(model, Letters(), thresholds, TEXTS, [0.5, 0.9], max_length=64, progress=False)
    assert list(result.results.gate_sparsity) == [0.0, 0.5, 0.9]
    dense = document_nll(model, Letters(), TEXTS, max_length=64, progress=False)
    assert result.at(0.0).nll_nats == pytest.approx(dense.nll_nats.sum() / dense.tokens.sum())
    sparse = sparsify(copy.deepcopy(model), thresholds, 0.9)
    alone = document_nll(sparse, Letters(), TEXTS, max_length=64, progress=False)
    assert result.at(0.9).nll_nats == pytest.approx(alone.nll_nats.sum() / alone.tokens.sum(), rel=1e-6)
    assert result.at(0.9).delta_low <= result.at(0.9).delta_nll <= result.at(0.9).delta_high
    assert 0.7 < result.at(0.9).realised_sparsity < 1
    assert not any(type(module).__name__ == "CatsMLP" for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sparse_model_is_not_its_own_baseline(parts):
    model, thresholds = parts
    expected = sweep(model, Letters(), thresholds, TEXTS, [0.5], max_length=64, progress=False).results
    sparsify(model, thresholds, 0.9)
    results = sweep(model, Letters(), thresholds, TEXTS, [0.5], max_length=64, progress=False).results
    assert results.equals(expected)


def test_documents_add_up_to_the_mean(parts):
    model, thresholds = parts
    result = sweep(model, Letters(), thresholds, TEXTS, [0.7], max_length=64, progress=False)
    by_document = result.by_document
    assert sorted(by_document.document) == list(range(8))
    mean = (by_document.delta_nll * by_document.tokens).sum() / by_document.tokens.sum()
    assert result.at(0.7).delta_nll == pytest.approx(mean, abs=1e-9)


def test_a_wrong_sparsity_leaves_the_model_dense(parts):
    model, thresholds = parts
    with pytest.raises(CatsError, match="outside"):
        sweep(model, Letters(), thresholds, TEXTS, [0.5, 1.5], max_length=64, progress=False)
    assert not any(type(module).__name__ == "CatsMLP" for module in model.modules())

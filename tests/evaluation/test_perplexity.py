"""Perplexity: every token scored once with the right context, compared document by document."""

import numpy as np
import pandas as pd
import pytest
import torch
from toys import VOCABULARY, Characters, constant_thresholds, toy

from cats import CatsError, sparsify
from cats.evaluation.intervals import paired_interval
from cats.evaluation.perplexity import document_nll, perplexity

TEXTS = ["".join(chr(40 + (7 * i * n) % 80) for i in range(n)) for n in (5, 40, 17, 64)]


def by_hand(model, ids: list[int], first: int) -> float:
    """Summed NLL of ids[first:] from one forward pass over all of them."""
    with torch.no_grad():
        log = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log[i - 1, ids[i]]) for i in range(first, len(ids)))


@pytest.mark.parametrize("bos", [False, True])
def test_sums_of_whole_documents(bos):
    model, tokenizer = toy(), Characters(bos)
    scores = document_nll(model, tokenizer, TEXTS, max_length=128, progress=False)
    assert scores.tokens.tolist() == [len(text) - (0 if bos else 1) for text in TEXTS]
    for text, nll in zip(TEXTS, scores.nll_nats, strict=True):
        assert nll == pytest.approx(by_hand(model, tokenizer(text).input_ids, 1), rel=1e-5)


def test_uniform_predictions_give_the_vocabulary():
    model = toy()
    model.lm_head.weight.data.zero_()
    total = perplexity(document_nll(model, Characters(), TEXTS, progress=False, max_length=32))
    assert total["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert total["nll_nats"] == pytest.approx(np.log(VOCABULARY), rel=1e-5)
    assert total["documents"] == 4 and total["tokens"] == sum(map(len, TEXTS)) - 4


@pytest.mark.parametrize("bos", ["never", "always"])
@pytest.mark.parametrize("stride", [None, 1, 5, 16])
def test_windows_score_every_token_once(stride, bos):
    model, tokenizer = toy(), Characters(True)
    options = dict(max_length=16, stride=stride, bos=bos, progress=False)
    scores = document_nll(model, tokenizer, TEXTS, **options)
    assert scores.tokens.tolist() == [len(text) - (bos == "never") for text in TEXTS]


def test_windows_have_the_context_that_the_stride_leaves():
    model, tokenizer = toy(), Characters()
    ids = tokenizer(TEXTS[1]).input_ids
    scores = document_nll(model, tokenizer, [TEXTS[1]], max_length=16, stride=6, progress=False)
    expected = by_hand(model, ids[:16], 1)
    done = 16
    while done < len(ids):
        start = done - 10
        stop = min(start + 16, len(ids))
        expected += by_hand(model, ids[start:stop], done - start)
        done = stop
    assert scores.nll_nats[0] == pytest.approx(expected, rel=1e-5)


def test_documents_can_be_cut_and_empty_ones_are_left_out():
    model, tokenizer = toy(), Characters()
    scores = document_nll(
        model, tokenizer, ["", "x", TEXTS[3]], tokens_per_document=10, max_length=64, progress=False
    )
    assert scores.document.tolist() == [2] and scores.tokens.tolist() == [9]
    expected = by_hand(model, tokenizer(TEXTS[3][:10]).input_ids, 1)
    assert scores.nll_nats[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(CatsError, match="No document has a token to score"):
        document_nll(model, tokenizer, ["", "x"], max_length=64, progress=False)


def test_batching_does_not_change_the_sums(monkeypatch):
    model, tokenizer = toy("gemma3"), Characters()
    together = document_nll(model, tokenizer, TEXTS, max_length=32, progress=False)
    monkeypatch.setattr("cats.evaluation.perplexity._BATCH_TOKENS", 1)
    alone = document_nll(model, tokenizer, TEXTS, max_length=32, progress=False)
    np.testing.assert_allclose(together.nll_nats, alone.nll_nats, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_length": 1}, "max_length=1 is outside 2 … 256"),
        ({"max_length": 257}, "max_length=257 is outside"),
        ({"max_length": 16, "stride": 0}, "stride=0 is outside 1 … max_length=16"),
        ({"max_length": 16, "stride": 17}, "stride=17 is outside"),
        ({"max_length": 16, "bos": "some"}, "Unknown BOS policy"),
        ({"max_length": 16, "bos": "always"}, "has no BOS token"),
    ],
)
def test_wrong_options(options, reason):
    with pytest.raises(CatsError, match=reason):
        document_nll(toy(), Characters(), TEXTS, progress=False, **options)


def scores(nll, tokens=None) -> pd.DataFrame:
    tokens = [10] * len(nll) if tokens is None else tokens
    return pd.DataFrame({"document": range(len(nll)), "tokens": tokens, "nll_nats": np.array(nll, float)})


def test_interval_of_a_constant_difference_is_that_difference():
    for documents in (8, 30):
        base = scores([20.0 + 3 * number for number in range(documents)])
        result = paired_interval(base, scores(base.nll_nats + 1.0))
        assert result.pop("interval") == ("t" if documents == 8 else "percentile bootstrap")
        assert result == pytest.approx({"delta_nll": 0.1, "delta_low": 0.1, "delta_high": 0.1})


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        tokens = generator.integers(50, 150, size=40)
        base = generator.normal(3, 0.5, size=40) * tokens
        other = base + generator.normal(0.05, 0.1, size=40) * tokens
        found = paired_interval(scores(base, tokens), scores(other, tokens), resamples=500, seed=trial)
        covered += found["delta_low"] <= 0.05 <= found["delta_high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_is_seeded_and_weighs_documents_by_tokens():
    tokens = [10, 100] * 20
    base, other = scores([10.0, 100.0] * 20, tokens), scores([20.0, 100.0] * 20, tokens)
    first, again = paired_interval(base, other, seed=3), paired_interval(base, other, seed=3)
    assert first == again and first["delta_nll"] == pytest.approx(10 / 110)


def test_interval_of_different_documents_is_refused():
    base = scores([1.0, 2.0, 3.0])
    for other in (scores([1.0, 2.0]), scores([1.0, 2.0, 3.0], [10, 10, 11])):
        with pytest.raises(CatsError, match="not of the same documents and tokens"):
            paired_interval(base, other)
    assert paired_interval(scores([10.0]), scores([11.0])) == {
        **{"delta_nll": 0.1, "delta_low": None, "delta_high": None, "interval": None}
    }


def test_sparsity_costs_likelihood_on_the_embedded_model(smollm):
    from cats import Thresholds, corpora, paths, restore

    texts = corpora.load(split="test").documents[:3]
    options = dict(tokens_per_document=120, max_length=128, progress=False)
    dense = document_nll(smollm.model, smollm.tokenizer, texts, **options)
    thresholds = Thresholds.load(paths.THRESHOLDS / "smollm2-135m-instruct.json")
    deltas = []
    try:
        for sparsity in (0.0, 0.3, 0.9):
            sparsify(smollm.model, thresholds, sparsity)
            sparse = document_nll(smollm.model, smollm.tokenizer, texts, **options)
            deltas.append(paired_interval(dense, sparse, resamples=200)["delta_nll"])
    finally:
        restore(smollm.model)
    assert deltas[0] == pytest.approx(0, abs=1e-5)
    assert abs(deltas[1]) < 0.2 and deltas[2] > 0.5


def test_sparse_and_dense_toys_score_the_same_tokens():
    model, tokenizer = toy(), Characters()
    dense = document_nll(model, tokenizer, TEXTS, progress=False, max_length=64)
    sparsify(model, constant_thresholds(model), 0.5)
    sparse = document_nll(model, tokenizer, TEXTS, progress=False, max_length=64)
    assert sparse.tokens.equals(dense.tokens) and not np.allclose(sparse.nll_nats, dense.nll_nats)
    assert np.isfinite(paired_interval(dense, sparse)["delta_nll"])

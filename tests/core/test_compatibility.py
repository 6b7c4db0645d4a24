"""What version 0.1 saved still loads: a sparse model and a thresholds file, written by commit 942d868."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cats

SAVED = Path(__file__).with_name("saved-0.1")
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
FACE = (
    *("CatsConfig", "CatsError", "SparsityMeter", "Thresholds", "attention", "calibrate", "cats_mlps"),
    *("find_gated_mlps", "restore", "set_sparsity", "sparsify"),
)


def last_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([EXPECTED["input_ids"]])).logits[0, -1]


def test_a_model_saved_sparse_has_the_logits_that_it_had():
    model = AutoModelForCausalLM.from_pretrained(SAVED / "model")
    assert len(cats.cats_mlps(model)) == 2
    expected = torch.tensor(EXPECTED["last_logits"])
    torch.testing.assert_close(last_logits(model), expected, rtol=1e-4, atol=1e-4)
    cats.restore(model)
    assert (last_logits(model) - expected).abs().max() > 1e-2, "dense, it would have others"
    cats.sparsify(model, cats.Thresholds.load(SAVED / "thresholds.json"), EXPECTED["sparsity"])
    torch.testing.assert_close(last_logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_thresholds_file_has_the_thresholds_that_it_had():
    thresholds = cats.Thresholds.load(SAVED / "thresholds.json")
    assert thresholds.at(EXPECTED["sparsity"]).flatten().tolist() == pytest.approx(EXPECTED["thresholds"])


@pytest.mark.parametrize("name", FACE)
def test_the_face_has_every_name_that_it_had(name):
    assert getattr(cats, name) is not None
    assert name in cats.__all__ or name == "attention"


def test_the_attention_of_version_0_1_is_that_of_the_decoding_room():
    from cats import attention
    from cats.decoding import attention as room

    assert attention is room and callable(attention.install)

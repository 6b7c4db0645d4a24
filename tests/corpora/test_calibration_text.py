"""The text that rules are calibrated on."""

import evaluation_toys
import torch

from cats import corpora
from cats.corpora import Calibration, calibration_text


def test_counted_padding_is_text_to_the_calibration_alone(monkeypatch):
    tokenizer = evaluation_toys.tokenizer()
    documents = ["a cat sat", "a cat sat on a mat and saw two birds fly", "it"]
    info = {"name": "toy", "split": "train"}
    corpus = corpora.Corpus("toy", "train", documents, info)
    monkeypatch.setattr(calibration_text, "load", lambda name, split: corpus)
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

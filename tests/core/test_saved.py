"""A sparse model on disk: saved as its modules are, refused where a buffer of CATS is missing or wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import batches, constant_thresholds, tokens, toy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from cats import CatsError, calibrate, cats_mlps, find_gated_mlps, restore, sparsify
from cats.core.centres import Setting
from cats.core.config import CatsConfig
from cats.core.sparsify import install

NAME = "model.layers.1.mlp.threshold"


def kinds(model) -> set[str]:
    return {type(module).__name__ for module in model.modules()} & {"CatsMLP", "CentredMLP"}


def test_a_part_made_sparse_is_saved_with_the_whole(tmp_path):
    model = toy()
    sparsify(model.get_decoder(), calibrate(model, batches(), progress=False), 0.9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kinds(again) == {"CatsMLP"}
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_the_body_of_a_classifier_is_saved_with_it(tmp_path):
    config = toy().config
    model = AutoModelForSequenceClassification.from_config(config).eval()
    sparsify(model.model, constant_thresholds(model), 0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert kinds(again) == {"CatsMLP"}
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_the_text_model_of_a_vision_model_is_saved_with_it(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = toy("gemma3").config.to_dict()
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    language = model.model.language_model
    sparsify(language, constant_thresholds(language), 0.5)
    model.save_pretrained(tmp_path)
    again = Gemma3ForConditionalGeneration.from_pretrained(tmp_path)
    assert kinds(again) == {"CatsMLP"}
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_model_of_which_one_layer_is_sparse_is_not_saved(tmp_path):
    model = toy()
    layer = model.model.layers[0]
    sparsify(layer, constant_thresholds(layer), 0.5)
    with pytest.raises(CatsError, match=r"2 gated MLPs of this model are dense .* and 1 sparse"):
        model.save_pretrained(tmp_path / "whole")


def test_what_a_part_was_given_later_is_what_is_saved(tmp_path):
    model = toy()
    thresholds = constant_thresholds(model)
    sparsify(model, thresholds, 0.2)
    sparsify(model.get_decoder(), thresholds, [0.5, 0.6, 0.7])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["sparsity"] == [0.5, 0.6, 0.7] and saved["thresholds"]["model"]["id"] == "toy"


@pytest.mark.parametrize("restored", [True, False])
def test_a_dense_model_of_a_sparse_models_configuration_is_saved_dense(tmp_path, restored):
    model = toy()
    sparsify(model, constant_thresholds(model), 0.5)
    model.save_pretrained(tmp_path / "sparse")
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "sparse")).eval()
    if restored:
        restore(dense)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not kinds(again)
    assert torch.equal(again(tokens()).logits, dense(tokens()).logits)


@pytest.fixture(params=["layer", "centred"])
def sparse(request, tmp_path):
    """A saved sparse model, of one threshold a layer or of the rule centred, and its folder."""
    model = toy()
    if request.param == "layer":
        sparsify(model, constant_thresholds(model), 0.5)
    else:
        vectors = [torch.full((80,), 0.1)] * 3
        settings = [Setting(vector, vector) for vector in vectors]
        install(model, find_gated_mlps(model), settings, CatsConfig(0.5, {}, per="neuron"))
    model.save_pretrained(tmp_path)
    assert kinds(AutoModelForCausalLM.from_pretrained(tmp_path))
    return tmp_path


def change(folder, edit) -> None:
    """Edit the tensors of a checkpoint, by name."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "missing": (lambda t: t.pop(NAME), "has 2 thresholds for 3 layers"),
    "renamed": (
        lambda t: t.update({NAME.replace(".1.", ".7."): t.pop(NAME)}),
        "lacks layers.1.mlp.threshold",
    ),
    "twice": (lambda t: t.update({"other." + NAME: t[NAME].clone()}), "has 4 thresholds for 3 layers"),
    "another shape": (lambda t: t.update({NAME: torch.zeros(7)}), r"lacks layers.1.mlp.threshold of shape"),
    "not a number": (lambda t: t[NAME].fill_(torch.nan), "threshold of layer 1 is negative or not finite"),
    "infinite": (lambda t: t[NAME].fill_(torch.inf), "threshold of layer 1 is negative or not finite"),
    "negative": (lambda t: t[NAME].fill_(-0.1), "threshold of layer 1 is negative or not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_thresholds_that_are_not_whole_are_refused(sparse, damage):
    edit, message = DAMAGES[damage]
    change(sparse, edit)
    with pytest.raises(CatsError, match=message):
        AutoModelForCausalLM.from_pretrained(sparse)


@pytest.mark.parametrize("sparse", ["centred"], indirect=True)
@pytest.mark.parametrize("buffer", ["centre", "shared"])
def test_a_centred_layer_without_its_buffers_is_refused(sparse, buffer):
    name = NAME.replace("threshold", buffer)
    change(sparse, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(CatsError, match=f"{buffer} of layer 1 is negative or not finite"):
        AutoModelForCausalLM.from_pretrained(sparse)
    change(sparse, lambda tensors: tensors.pop(name))
    with pytest.raises(CatsError, match=f"lacks layers.1.mlp.{buffer}"):
        AutoModelForCausalLM.from_pretrained(sparse)


@pytest.mark.parametrize("sparse", ["layer"], indirect=True)
def test_layers_called_centred_that_have_no_buffers_are_refused(sparse):
    file = sparse / "config.json"
    config = json.loads(file.read_text())
    for layers, message in (([0], "lacks|shape"), ([5], "layers \\[5\\] are centred by config.json")):
        config["quantization_config"] |= {"centred": layers}
        file.write_text(json.dumps(config))
        with pytest.raises(CatsError, match=message):
            AutoModelForCausalLM.from_pretrained(sparse)


@pytest.mark.parametrize("sparse", ["layer"], indirect=True)
def test_a_bin_checkpoint_is_held_to_the_same(sparse):
    tensors = load_file(sparse / "model.safetensors")
    (sparse / "model.safetensors").unlink()
    torch.save(tensors, sparse / "pytorch_model.bin")
    assert len(cats_mlps(AutoModelForCausalLM.from_pretrained(sparse))) == 3
    del tensors[NAME]
    torch.save(tensors, sparse / "pytorch_model.bin")
    with pytest.raises(CatsError, match="has 2 thresholds for 3 layers"):
        AutoModelForCausalLM.from_pretrained(sparse)

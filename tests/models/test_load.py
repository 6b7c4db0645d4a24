"""Models by name: embedded, folders, GGUF files, random geometries; what is said of everything else."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from toys import tokens, toy
from transformers import AutoModelForCausalLM

from cats import CatsError, find_gated_mlps, paths
from cats.models import embedded, memory
from cats.models import load as models
from cats.models.geometries import GEOMETRIES


@pytest.fixture
def offline(monkeypatch):
    """A proxy that refuses every connection."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path):
    """A saved toy model with the tokenizer that it needs."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    toy().save_pretrained(tmp_path / "toy-model")
    tokenizer = Tokenizer(WordLevel({"<s>": 1, "</s>": 2, "a": 3}, unk_token="a"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "toy-model")
    return tmp_path / "toy-model"


def test_embedded_model(smollm):
    info = smollm.info
    assert (info["id"], info["weights"], info["parameters"]) == (
        "smollm2-135m-instruct",
        "trained",
        134515008,
    )
    assert info["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert info["dtype"] == "float32" and info["layers"] == 30 and not smollm.model.training
    assert len(find_gated_mlps(smollm.model)) == 30
    assert smollm.tokenizer.pad_token_id is not None
    assert smollm.tokenizer.decode(smollm.tokenizer("Sparsity is").input_ids) == "Sparsity is"
    prompt = smollm.tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        new = smollm.model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, -3:]
    assert "Paris" in smollm.tokenizer.decode(new)
    assert models.config("smollm2-135m-instruct").intermediate_size == smollm.model.config.intermediate_size


@pytest.mark.parametrize("name", GEOMETRIES)
def test_random_geometries(name):
    config = models.config(f"random:{name}")
    assert config.num_hidden_layers >= 28 and models.config(name).to_dict() == config.to_dict()
    config.num_hidden_layers = 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [mlp.intermediate_size for mlp in find_gated_mlps(model)] == [config.intermediate_size] * 2


# Parameter counts that the models' cards state.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("mistral-7b", 7_241_732_096),
        ("llama-3-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_geometries_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config(f"random:{name}"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_random_weights_are_seeded():
    def weights(seed):
        return models.load("random:smollm2-135m-instruct", layers=1, seed=seed).model.state_dict()

    state = torch.get_rng_state()
    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_folder(folder):
    loaded = models.load(str(folder))
    assert torch.equal(loaded.model(tokens()).logits, toy()(tokens()).logits)
    assert loaded.info["id"] == "toy-model" and len(loaded.info["sha256"]) == 64
    assert str(folder.parent) not in json.dumps(loaded.info)
    assert loaded.tokenizer.pad_token == "</s>"
    again = models.load(str(folder), dtype="bfloat16")
    assert again.model.dtype == torch.bfloat16 and again.info["sha256"] == loaded.info["sha256"]


def test_damaged_folders(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CatsError, match="cannot be read, it may be truncated or incomplete"):
        models.load(str(folder))
    weights.unlink()
    with pytest.raises(CatsError, match="cannot be read"):
        models.load(str(folder))
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(CatsError, match="cannot be read"):
        models.load(str(folder))
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(CatsError, match="cannot be read"):
        models.load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CatsError, match=r"holds no config\.json"):
        models.load(str(folder))


def test_truncated_gguf(tmp_path, smollm):
    whole = paths.CACHE / "files" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not whole.exists():
        pytest.skip("the archive was not kept in the cache")
    with whole.open("rb") as source, (tmp_path / "cut.gguf").open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.truncate(30_000_000)
    with pytest.raises(CatsError, match="cannot be read, it may be truncated"):
        models.load(str(tmp_path / "cut.gguf"))
    (tmp_path / "head.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CatsError, match="cannot be read, it may be truncated"):
        models.load(str(tmp_path / "head.gguf"))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("smollm2-135m-instruc", {}, r"Unknown model .* \(did you mean smollm2-135m-instruct\?\)"),
        ("zzz", {}, "Unknown model 'zzz': use one of smollm2-135m-instruct"),
        ("random:llama-2-8b", {}, r"Unknown geometry 'llama-2-8b' \(did you mean llama-"),
        ("random:", {}, "Unknown geometry ''"),
        ("smollm2-135m-instruct", {"dtype": "int4"}, "Unknown dtype 'int4': use one of float32"),
        ("smollm2-135m-instruct", {"device": "tpu0"}, "Unknown device 'tpu0'"),
        ("smollm2-135m-instruct", {"layers": 2}, "layers=2 needs random weights"),
        ("random:llama-2-7b", {"layers": 33}, r"layers=33 is outside 1 … 32"),
        ("random:llama-2-7b", {"layers": 0}, "layers=0 is outside"),
        ("./missing.gguf", {}, r"There is no model folder or \.gguf file \./missing\.gguf"),
        ("missing.gguf", {}, "There is no model folder"),
        ("../no/folder", {}, "There is no model folder"),
        ("no--body/model", {}, "Unknown model"),
        ("nobody/model.git", {}, "Unknown model"),
        ("a/b/c", {}, "Unknown model"),
    ],
)
def test_wrong_names_and_options(name, options, reason):
    with pytest.raises(CatsError, match=reason):
        models.load(name, **options)


def test_weights_that_memory_does_not_hold_are_not_made(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 3.0)
    with pytest.raises(CatsError, match=r"random:llama-2-7b in bfloat16 needs about .* has 3\.0 GB free"):
        models.load("random:llama-2-7b", dtype="bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there():
    with pytest.raises(CatsError, match="PyTorch sees no GPU here: use device=cpu"):
        models.load(device="cuda")


def test_hub_without_network(offline):
    with pytest.raises(CatsError, match="not in the local hub cache and the hub cannot be reached"):
        models.load("nobody/no-such-model")


def test_licence_has_to_be_accepted(monkeypatch):
    monkeypatch.delenv("CATS_ACCEPT_LICENCE", raising=False)
    with pytest.raises(CatsError, match="set CATS_ACCEPT_LICENCE=gemma-3-270m to load it"):
        models.load("gemma-3-270m")
    assert models.config("gemma-3-270m").model_type == "gemma3_text"


def test_a_tokenizer_that_was_read_wrongly_is_told(smollm):
    class Letters:
        def __call__(self, text):
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    embedded.check_tokenizer(models.DEFAULT, smollm.tokenizer)
    with pytest.raises(CatsError, match="reads the tokenizer of smollm2-135m-instruct wrongly: install"):
        embedded.check_tokenizer(models.DEFAULT, Letters())


def test_cached_model_is_verified(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    manifest = {
        "schema": 1,
        "files": {"model.safetensors": embedded._describe(tmp_path / "model.safetensors")},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    embedded._verify(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" + bytes(99))
    with pytest.raises(CatsError, match="is corrupted"):
        embedded._verify(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(90))
    with pytest.raises(CatsError, match=r"is truncated \(90 of 100 bytes\)"):
        embedded._verify(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CatsError, match="is missing"):
        embedded._verify(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CatsError, match=r"no readable manifest\.json"):
        embedded._verify(tmp_path)

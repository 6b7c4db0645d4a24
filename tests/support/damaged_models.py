"""Model files that the tests damage: sparse models that `save_pretrained` wrote, and GGUF files."""

import json
from pathlib import Path

import evaluation_toys
import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from cats import cats_mlps
from cats.models import load as models

_LETTERS = [*map(chr, range(33, 127)), "ab", "cd"]
_GGUF_SIZES = {
    "llama.block_count": "num_hidden_layers",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.context_length": "max_position_embeddings",
}


def write_sparse(folder: Path) -> None:
    loaded = evaluation_toys.loaded(num_hidden_layers=2)
    evaluation_toys.thin(loaded.model, [0.4, 0.6]).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def write_sparse_config(folder: Path) -> Path:
    write_sparse(folder)
    return folder / "config.json"


def write_sparse_weights(folder: Path) -> Path:
    write_sparse(folder)
    return folder / "model.safetensors"


def sparse(path: Path) -> None:
    model = models.load(str(path.parent)).model
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    about = config.get("quantization_config")
    modules = cats_mlps(model) if about else []
    if modules:
        levels = about["sparsity"]
        levels = levels if isinstance(levels, list) else [levels] * len(modules)
        assert [module.sparsity for module in modules] == levels
        assert all(module.prefill == about.get("prefill", "masked") for module in modules)
    for size in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"):
        assert size not in config or getattr(model.config, size) == config[size]
    state = model.state_dict()
    for name, tensor in load_file(path.parent / "model.safetensors").items():
        found = state[name if name in state else name.replace("model.", "", 1)]
        assert torch.equal(found.nan_to_num(7.0), tensor.float().nan_to_num(7.0)), name
    threshold = [module.threshold for module in modules]
    assert all(bool(t.isfinite().all()) and bool((t >= 0).all()) for t in threshold)


def write_gguf(folder: Path) -> Path:
    """A llama of two layers with a byte-pair tokenizer of single letters, in float32."""
    draw = np.random.default_rng(0)
    file = gguf.GGUFWriter(folder / "toy.gguf", "llama")
    sizes = dict(block_count=2, embedding_length=16, feed_forward_length=24, context_length=64)
    for name, value in (sizes | dict(head_count=4, head_count_kv=2, layer_norm_rms_eps=1e-5)).items():
        getattr(file, f"add_{name}")(value)
    file.add_rope_dimension_count(4)
    file.add_vocab_size(len(_LETTERS) + 2)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(["<s>", "</s>", *_LETTERS])
    file.add_token_types([3, 3, *[1] * len(_LETTERS)])
    file.add_token_merges(["a b", "c d"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    shapes = {"token_embd": (len(_LETTERS) + 2, 16), "output_norm": (16,)}
    for block in ("blk.0.", "blk.1."):
        shapes |= {block + "attn_norm": (16,), block + "ffn_norm": (16,)}
        shapes |= {block + f"attn_{name}": (rows, 16) for name, rows in (("q", 16), ("k", 8), ("v", 8))}
        shapes |= {block + "attn_output": (16, 16), block + "ffn_gate": (24, 16), block + "ffn_up": (24, 16)}
        shapes |= {block + "ffn_down": (16, 24)}
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return folder / "toy.gguf"


def gguf_file(path: Path) -> None:
    model = models.load(str(path)).model
    reader = gguf.GGUFReader(path)
    for key, name in _GGUF_SIZES.items():
        assert key not in reader.fields or getattr(model.config, name) == reader.fields[key].contents()
    state = model.state_dict()
    for tensor in reader.tensors:
        if "ffn_" not in tensor.name or "norm" in tensor.name:
            continue
        _, layer, kind, _ = tensor.name.split(".")
        found = state[f"model.layers.{layer}.mlp.{kind.removeprefix('ffn_')}_proj.weight"]
        written = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found.numpy(), written, equal_nan=True), tensor.name

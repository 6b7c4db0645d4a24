"""Load a language model by name: embedded, hub id, local folder or GGUF file, or random weights."""

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from cats import paths
from cats.errors import CatsError, did_you_mean
from cats.models import memory
from cats.models.archives import SOURCES
from cats.models.embedded import EMBEDDED, check_tokenizer, model_folder
from cats.models.geometries import GEOMETRIES

DEFAULT = "smollm2-135m-instruct"
RANDOM = "random:"
_INCOMPLETE = {
    "missing_keys": "missing",
    "unexpected_keys": "without a place in the model",
    "mismatched_keys": "of another shape",
    "error_msgs": "unreadable",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedModel:
    """A model in evaluation mode, its tokenizer (None for a bare geometry) and what a record says about it.

    `info`: id, revision (hub commit) or sha256, parameters, weights ("trained" or "random"), dtype,
    architecture, layers, and the seed of random weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    info: dict


def load(
    name: str = DEFAULT,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    layers: int | None = None,
) -> LoadedModel:
    """Load `name` on `device` in `dtype`; `seed` and `layers` (keep that many) are for random weights only.

    `device` "auto" spreads a model over all GPUs, as accelerate sees fit.

    Names: an embedded model, a hub id ("organisation/model"), a local folder or .gguf file,
    "random:<geometry>" or "random:<embedded name>". Raises CatsError for an unknown name, a wrong dtype or
    device, damaged files, a gated model, a missing network, and random weights that memory does not hold.
    """
    if dtype not in DTYPES:
        raise CatsError(f"Unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}.")
    memory.check_device(device)
    if name.startswith(RANDOM):
        return _random(name, DTYPES[dtype], device, seed, layers)
    if layers is not None:
        raise CatsError(f"layers={layers} needs random weights: ask for {RANDOM}<geometry> or drop layers.")
    source, identity = _locate(name)
    spread = {"device_map": "auto"} if device == "auto" else {}
    with explained(name, source):
        model = complete(name, AutoModelForCausalLM, source, dtype=DTYPES[dtype], **spread)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if name in EMBEDDED:
        check_tokenizer(name, tokenizer)
        model.config.name_or_path = name  # not a path into this machine's cache
    return _loaded(model if spread else model.to(device), tokenizer, identity, weights="trained")


def config(name: str) -> PretrainedConfig:
    """The configuration of a model of any name that `load` knows, without its weights.

    Raises CatsError for an unknown name, and for a configuration that no model can be built from.
    """
    shape = name.removeprefix(RANDOM)
    known = {**GEOMETRIES, **{key: embedded.config for key, embedded in EMBEDDED.items()}}
    if shape in known:
        return AutoConfig.for_model(**known[shape])
    if name.startswith(RANDOM):
        raise CatsError(f"Unknown geometry {shape!r}{_suggest(shape, known)}.")
    source, _ = _locate(name)
    with explained(name, source):
        found = AutoConfig.from_pretrained(**source)
        text = found.get_text_config()
        if type(text) in AutoModelForCausalLM._model_mapping:
            with torch.device("meta"):  # what is wrong in it shows when a model is built, here without memory
                AutoModelForCausalLM.from_config(text)
        return found


def complete(name: str, auto, source: dict, **options) -> PreTrainedModel:
    """`auto.from_pretrained`, every weight of which comes from the checkpoint; raises CatsError otherwise.

    Transformers itself fills what is missing with random weights, and leaves out what has no place.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report that Transformers prints is said below in one sentence
    try:
        model, report = auto.from_pretrained(**source, **options, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    for key, what in _INCOMPLETE.items():
        if report.get(key):
            first = sorted(map(str, report[key]))[0]
            raise CatsError(
                f"The weights of {name} do not fit its configuration: {len(report[key])} {what}, the first "
                f"{first}; get the whole model, or correct its config.json."
            )
    return model


def _locate(name: str) -> tuple[dict, dict]:
    """Keyword arguments for `from_pretrained`, and the identity (id, revision or sha256)."""
    if name in EMBEDDED:
        folder = model_folder(name)
        return {"pretrained_model_name_or_path": folder}, {
            "id": name,
            "revision": None,
            "sha256": SOURCES[name].sha256,
            "read_from": EMBEDDED[name].read_from,
        }
    path = paths.named(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CatsError(f"The folder {name} holds no config.json, so it is no saved Transformers model.")
        return {"pretrained_model_name_or_path": path}, {
            "id": path.resolve().name,
            "revision": None,
            "sha256": _fingerprint(path),
        }
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}, {
            "id": path.name,
            "revision": None,
            "sha256": _fingerprint(path),
            "read_from": "GGUF",
        }
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        raise CatsError(f"There is no model folder or .gguf file {name}: check the path.")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not re.search(r"--|\.\.|[.-](/|$)|\.git$", name):
        source = _hub_source(name)
        revision = source.get("revision") or source["pretrained_model_name_or_path"].name
        return source, {"id": name, "revision": revision, "sha256": None}
    choices = [*EMBEDDED, *(RANDOM + geometry for geometry in GEOMETRIES)]
    raise CatsError(f"Unknown model {name!r}{_suggest(name, choices)}, a hub id or a local folder.")


def _hub_source(name: str) -> dict:
    """A hub id at its present commit; without network the snapshot in the local hub cache.

    One short question first: `from_pretrained` itself retries for most of a minute without network.
    """
    try:
        revision = HfApi().model_info(name, timeout=10).sha
    except RepositoryNotFoundError as error:
        raise CatsError(
            f"The hub has no model {name} that you can see: check the id, or log in if it is private."
        ) from error
    except Exception as error:  # each version of huggingface_hub brings its own HTTP client and its errors
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            raise CatsError(
                f"{name} is not in the local hub cache and the hub cannot be reached: "
                f"connect, or use {DEFAULT}."
            ) from error
        return {"pretrained_model_name_or_path": Path(cached).parent}
    return {"pretrained_model_name_or_path": name, "revision": revision}


def _suggest(name: str, choices) -> str:
    return f"{did_you_mean(name, choices)}: use one of {', '.join(choices)}"


def _fingerprint(path: Path) -> str:
    """sha256 over name, size, first and last MB of each weight file: tells models apart in milliseconds."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


@contextmanager
def explained(name: str, source: dict) -> Iterator[None]:
    """Whatever the libraries below raise on a model's files becomes one sentence.

    A configuration or a checkpoint can be broken in more ways than there are kinds of errors.
    """
    try:
        with quiet_unless_terminal():
            yield
    except (CatsError, MemoryError):
        raise
    except torch.OutOfMemoryError as error:
        raise CatsError(f"{name} does not fit the GPU's memory: use bfloat16 or a larger GPU.") from error
    except Exception as error:
        local = Path(source["pretrained_model_name_or_path"]).is_dir()
        raise CatsError(_explain_local(name, error) if local else _explain_hub(name, error)) from error


@contextmanager
def quiet_unless_terminal():
    """Transformers draws its loading bars wherever stderr goes; in a notebook or a log they are noise."""
    quiet = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()


def _explain_local(name: str, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"The model at {name} cannot be read, it may be truncated or incomplete ({reason})."


def _explain_hub(name: str, error: Exception) -> str:
    text = str(error)
    if "gated" in text:
        return (
            f"{name} is gated: accept its terms on the hub and log in with `hf auth login`, "
            f"or try the code with {DEFAULT}."
        )
    return f"{name} cannot be loaded ({' '.join(text.split())[:200]})."


def _random(name: str, dtype: torch.dtype, device: str, seed: int, layers: int | None) -> LoadedModel:
    """Random weights (normal, the configuration's initializer_range), made on the device in the dtype."""
    shape = config(name)
    if layers is not None:
        if not 1 <= layers <= shape.num_hidden_layers:
            raise CatsError(f"layers={layers} is outside 1 … {shape.num_hidden_layers}, what {name} has.")
        shape.num_hidden_layers = layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:layers]
    base = name.removeprefix(RANDOM)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(base)) if base in EMBEDDED else None
    device = "cpu" if device == "auto" else device
    memory.check(name, shape, str(dtype).removeprefix("torch."), device)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    identity = {"id": name, "revision": None, "sha256": None, "seed": seed}
    return _loaded(model, tokenizer, identity, weights="random")


def _loaded(model, tokenizer, identity: dict, *, weights: str) -> LoadedModel:
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as the reference code pads
    shape = model.config.get_text_config()
    info = {
        **identity,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "architecture": type(model).__name__,
        "layers": shape.num_hidden_layers,
    }
    return LoadedModel(model.eval(), tokenizer, info)

"""Thresholds as a file: JSON, and beside it the values per neuron as safetensors; read whole or refused."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cats import paths
from cats.core.activation import ACTIVATIONS
from cats.core.centres import Centres, decoded
from cats.core.quantiles import shortest
from cats.errors import CatsError
from cats.paths import write_atomically

SCHEMA = 1
CENTRED_SCHEMA = 2  # with the part "centres", which a reader of the first would pass over
_INLINE = 1 << 15  # more values than this (10 bytes of JSON each) go beside the JSON, as safetensors
_TENSORS = ("values", "scale")


def write(path: Path, document: dict, tensors: dict[str, Tensor]) -> None:
    """Write `document` and `tensors` (fp32) to the JSON file `path`, large tensors to a file beside it.

    The name of that file holds the hash of what is in it: no other file has it, and the tensors of the
    thresholds that stood at `path` before stay whole until these are. Raises CatsError where `path` is
    another kind of file, or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _beside(path)
    large = {name: t.float().contiguous() for name, t in tensors.items() if t.numel() > _INLINE}
    reference = None
    if large:
        data = save_tensors(large)
        digest = hashlib.sha256(data).hexdigest()
        beside = path.with_name(f"{path.stem}.thresholds-{digest[:16]}.safetensors")
        reference = {"file": beside.name, "sha256": digest}
        write_atomically(beside, data)
    document = {"schema": CENTRED_SCHEMA if "centres" in document else SCHEMA, **document}
    for name, tensor in tensors.items():
        document[name] = reference if name in large else shortest(tensor)
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    if before is not None and (reference is None or before.name != reference["file"]):
        before.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Raise CatsError where `path` is something else than a thresholds file, and would be lost."""
    if path.is_dir():
        raise CatsError(f"The thresholds file {path} is a folder: name a file that ends in .json.")
    if not path.exists():
        return
    try:
        document = paths.parse_json(path.read_bytes())
    except (OSError, ValueError):
        document = {}
    if "schema" not in document or "grid" not in document:
        raise CatsError(f"{path} is no thresholds file and would be overwritten: name another output.")


def _beside(path: Path) -> Path | None:
    """The safetensors file that the thresholds at `path` were written with, if that is what they say."""
    check_output(path)
    if not path.exists():
        return None
    document = paths.parse_json(path.read_bytes())
    for name in _TENSORS:
        reference = document.get(name)
        file = str(reference.get("file")) if isinstance(reference, dict) else ""
        if file.startswith(f"{path.stem}.thresholds-") and file == os.path.basename(file):
            return path.with_name(file)
    return None


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The document and its tensors (fp32) as written; CatsError for a file that is not whole or not ours."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else "it cannot be opened"
        raise CatsError(f"The thresholds file {path} cannot be read: {reason}.") from error
    try:
        document = paths.parse_json(data)
    except ValueError as error:
        raise CatsError(f"The thresholds file {path} is not valid JSON ({error}): make it again.") from error
    schema = document.get("schema")
    if type(schema) is not int or schema != (CENTRED_SCHEMA if "centres" in document else SCHEMA):
        raise CatsError(
            f"The thresholds file {path} has schema {repr(schema)[:80]}, this version reads {SCHEMA} and, "
            f"with centres, {CENTRED_SCHEMA}."
        )
    try:
        tensors = {name: _tensor(path, document, name) for name in _TENSORS if name in document}
        checked = {
            "model": _model(paths.json_field(document, "model", dict)),
            "activation": paths.json_field(document, "activation", str),
            "criterion": paths.json_field(document, "criterion", str),
            "corpus": paths.json_field(document, "corpus", dict),
            "tokens": paths.json_count(document, "tokens"),
            "policy": paths.json_field(document, "policy", dict),
            "grid": _numbers(paths.json_field(document, "grid", list), "grid"),
            "grid_error": paths.json_field(document, "grid_error", float),
        }
        if "centres" in document:
            checked["centres"] = _centres(paths.json_field(document, "centres", dict))
        if "values" not in tensors:
            raise ValueError("it lacks 'values'")
        if not 0 <= checked["grid_error"] <= 1:
            raise ValueError("'grid_error' is no share")
        if checked["activation"] not in ACTIVATIONS:
            raise ValueError(f"the activation {checked['activation']!r} is not known")
        if paths.json_field(document, "shape", list) != list(tensors["values"].shape):
            raise ValueError("'values' have not the shape that it says")
    except ValueError as error:
        raise CatsError(f"The thresholds file {path} is inconsistent ({error}): make it again.") from error
    return checked, tensors


def _model(model: dict) -> dict:
    """What thresholds say of their model, with sizes that are whole numbers and signs that are text."""
    sizes = model.get("intermediate_sizes", [])
    if type(sizes) is not list or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError("'intermediate_sizes' are not whole numbers")
    if type(model.get("gate_signs", "")) not in (str, type(None)):
        raise ValueError("'gate_signs' is not text")
    return model


def _centres(part: dict) -> Centres:
    """What `Centres.document` wrote; ValueError for anything else."""
    return Centres(
        gates=decoded(paths.json_field(part, "gates", list)),
        weights=decoded(paths.json_field(part, "weights", list)),
        values=_numbers(paths.json_field(part, "values", list), "values"),
        hidden_sizes=paths.json_field(part, "hidden_sizes", list),
        errors=_numbers(paths.json_field(part, "errors", list), "errors"),
    )


def _numbers(values: list, name: str) -> Tensor:
    """A tensor of nested lists of numbers alone."""
    todo = [values]
    while todo:
        value = todo.pop()
        if type(value) is list:
            todo += value
        elif type(value) not in (int, float):
            raise ValueError(f"{name!r} holds something that is no number")
    try:
        return torch.tensor(values, dtype=torch.float32)
    except TypeError as error:
        raise ValueError(f"{name!r} are lists of several lengths") from error


def _tensor(path: Path, document: dict, name: str) -> Tensor:
    """Values that stand in a thresholds file, or in the safetensors file that it was written with."""
    value = document[name]
    if type(value) is list:
        return _numbers(value, name)
    if type(value) is not dict:
        raise ValueError(f"{name!r} is neither numbers nor the name of a file")
    beside = path.with_name(os.path.basename(paths.json_field(value, "file", str)) or "?")
    try:
        data = beside.read_bytes()
    except OSError as error:
        raise CatsError(f"The thresholds file {path} needs {beside.name} beside it: copy both.") from error
    if hashlib.sha256(data).hexdigest() != value.get("sha256"):
        raise CatsError(f"{beside} does not belong to {path.name}, or is truncated: copy both again.")
    try:
        return load_tensors(data)[name].float()
    except (SafetensorError, KeyError) as error:
        raise CatsError(f"{beside} is damaged ({error}): make it again.") from error

"""The form that every plan has: a YAML file with a list of runs, and defaults for all of them."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin

from cats.errors import CatsError
from cats.records import yaml_file

_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "keys with values",
    list[str]: "a list of names",
    list[int]: "a list of whole numbers",
    tuple[int, ...]: "a list of whole numbers",
    list[dict]: "a list, each of keys with values",
    list[str | dict]: "a list, each a name or a name with its numbers",
}


def runs(path: Path, wanted: str) -> list[dict]:
    """Each run of the plan, over its `defaults`; raises CatsError for a file that is no plan.

    `wanted` names what a run must have, for the message.
    """
    content = yaml_file.read(path, "plan")
    if not isinstance(content, dict) or not content.get("runs"):
        raise CatsError(f"The plan {path} needs a list `runs`, each with {wanted}.")
    check(content, {"defaults": dict | None, "runs": list[dict]}, str(path))
    return [{**(content.get("defaults") or {}), **run} for run in content["runs"]]


def check(values: Mapping, types: Mapping, where: str) -> None:
    """Raises CatsError for the first of `values` that is none of `types`, by name, or not of its type.

    `types`: those of the fields of a dataclass, as `typing.get_type_hints` has them.
    """
    for key, value in values.items():
        if key not in types:
            raise CatsError(f"Unknown key {str(key)[:80]!r} in {where}: use {', '.join(sorted(types))}.")
        wanted = types[key]
        if not _is(value, wanted):
            kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
            words = " or ".join(_WORDS[kind] for kind in kinds if kind is not NoneType)
            raise CatsError(f"{key} in {where} is {repr(value)[:200]}, but must be {words}.")


def _is(value, kind) -> bool:
    """Whether a value read from YAML is of a type; a list must hold something, but for a tuple's."""
    if isinstance(kind, UnionType):
        return any(_is(value, each) for each in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and abs(value) < float("inf")
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    if get_origin(kind) in (list, tuple):
        whole = isinstance(value, (list, tuple)) and all(_is(each, get_args(kind)[0]) for each in value)
        return whole and (len(value) > 0 or get_origin(kind) is tuple)
    return type(value) is kind  # True is no int

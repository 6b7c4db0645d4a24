"""YAML read with the numbers of YAML 1.2, where `1e-5` is a number, `010` is ten and a date is text."""

import re
from pathlib import Path
from typing import ClassVar

import yaml

from cats.errors import CatsError

_KEPT = ("null", "bool", "merge")  # of its implicit types
_ALIASES = 100  # a file written by hand has a few; nested ones multiply beyond any memory


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other numbers: in its own YAML 1.1 `1e-5` is text and `1:30` is ninety."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in _KEPT]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > _ALIASES:
                raise yaml.YAMLError(f"more than {_ALIASES} aliases")
        return super().compose_node(parent, index)


def _whole(loader: Loader, node) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$"), list("-+0123456789")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def parse(text: str):
    """The value of a YAML text; raises yaml.YAMLError or ValueError where it is none, in one line."""
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


def read(path: Path, what: str):
    """The value in a YAML file, whose byte order mark is left out; `what` names the file in messages.

    Raises CatsError for a file that cannot be read or is no YAML.
    """
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CatsError(f"The {what} {path} cannot be read: {reason}.") from error
    except (yaml.YAMLError, ValueError) as error:
        first = (str(error).splitlines() or ["empty"])[0][:160]
        raise CatsError(f"The {what} {path} is not valid YAML ({first}).") from error

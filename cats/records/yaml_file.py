"""YAML read with the numbers of YAML 1.2, where `1e-5` is a number, `010` is ten and a date is text."""

import re
from pathlib import Path
from typing import ClassVar

import yaml

from cats.errors import explained

_KEPT = ("null", "bool", "merge")  # of its implicit types
_ALIASES = 100  # a file written by hand has a few
_VALUES = 100_000  # with what its aliases stand for: nested ones multiply beyond any memory


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other numbers: in its own YAML 1.1 `1e-5` is text and `1:30` is ninety."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in _KEPT]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    aliases = values = 0

    def __init__(self, stream):
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # of each node, by its id: how many values it stands for

    def compose_node(self, parent, index):
        before = self.values
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias:
            self.aliases += 1
            if self.aliases > _ALIASES:
                raise yaml.YAMLError(f"more than {_ALIASES} aliases")
            if id(node) not in self._sizes:
                raise yaml.YAMLError("an alias of what it is itself in")
            self.values += self._sizes[id(node)]
        else:
            self.values += 1
            self._sizes[id(node)] = self.values - before
        if self.values > _VALUES:
            raise yaml.YAMLError(f"more than {_VALUES:,} values")
        return node

    def construct_mapping(self, node, deep=False):
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in written if written.count(key) > 1 and key != "<<"]:
            raise yaml.YAMLError(f"the key {twice[0][:80]!r} is there twice")
        return super().construct_mapping(node, deep)


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
    """The value of a YAML text; raises yaml.YAMLError, ValueError or RecursionError where it is none."""
    return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader


def read(path: Path, what: str):
    """The value in a YAML file, whose byte order mark is left out; `what` names the file in messages.

    Raises CatsError for a file that cannot be read or is no YAML.
    """
    with explained(f"The {what} {path} cannot be read", "check the path"):
        text = path.read_bytes()
    with explained(f"The {what} {path} is not valid YAML", "correct it"):
        return parse(text.decode("utf-8-sig"))

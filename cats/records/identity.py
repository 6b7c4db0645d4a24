"""The identity of an op: a hash over the syntax trees of all that it runs, found by following names."""

import ast
import builtins
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from cats_kernels import registry

from cats import paths
from cats.errors import CatsError

Source = Callable[[str], str | None]  # a file's path in the repository → its text, None where there is none

_KERNELS = "kernels/cats_kernels"
# Every op by where it begins: files that may hold it, the second in earlier versions only, and a name.
OPS = {
    **{
        name: [((f"{_KERNELS}/{kernel.module.__name__.rpartition('.')[-1]}.py",), "launch")]
        for name, kernel in registry.KERNELS.items()
    },
    "centred": [((f"{_KERNELS}/centred.py",), "launch")],
    "cpu": [((f"{_KERNELS}/cpu.py",), "cats_mlp")],
    "decoding": [
        (("cats/decoding/graph.py", "cats/decoding.py"), "Decoder"),
        (("cats/decoding/attention.py", "cats/attention.py"), "install"),
    ],
}
_FOLLOWED = ("cats_kernels", "cats.decoding", "cats.attention")  # the last of earlier versions
_SIGNATURE = "triton.language.constexpr"  # the one type hint that changes what runs


def on_disk(path: str) -> str | None:
    """The text of a source file of this installation."""
    kernels = path.removeprefix(f"{_KERNELS}/")
    file = paths.ROOT / path if kernels == path else paths.KERNELS / kernels
    return file.read_text(encoding="utf-8") if file.is_file() else None


@functools.cache
def today(op: str) -> str | None:
    """The identity of an op in this version; None where this version no longer has it."""
    return identity(op, on_disk)


def identity(op: str, source: Source) -> str | None:
    """sha256 of an op in the sources that `source` reads; None where they do not have it.

    What counts are the syntax trees of the functions, classes and constants of `cats_kernels` and
    `cats.decoding` that the op reaches. Comments, docstrings, formatting, type hints, the words of errors,
    and the names of locals, helpers and modules do not. Raises CatsError for an unknown op.
    """
    if op not in OPS:
        raise CatsError(f"Unknown op {op!r}: use one of {', '.join(OPS)}.")
    reached = _Reached(source)
    for files, name in OPS[op]:
        file = next((file for file in files if source(file) is not None), None)
        if file is None or name not in reached.module(file).definitions:
            return None
        reached.place(reached.module(file), name)
    return reached.digest()


@dataclass
class _Module:
    """A file's statements by the names that they define, and the dotted names that its imports stand for."""

    package: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)

    def read(self, statements: list[ast.stmt]) -> None:
        for each in statements:
            if isinstance(each, ast.Import | ast.ImportFrom):
                self.imports |= _imported(each, self.package)
            elif isinstance(each, ast.If | ast.Try | ast.With):
                inner = [each.body, getattr(each, "orelse", []), getattr(each, "finalbody", [])]
                inner += [handler.body for handler in getattr(each, "handlers", [])]
                for part in inner:
                    self.read(part)
            elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.definitions.setdefault(each.name, []).append(each)
            elif isinstance(each, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                stored = [node.id for target in targets for node in ast.walk(target) if _stored(node)]
                for name in dict.fromkeys(stored):
                    self.definitions.setdefault(name, []).append(each)


class _Reached:
    """Definitions in the order in which they are met; their places in it stand for their names."""

    def __init__(self, source: Source):
        self.source = source
        self.modules: dict[str, _Module] = {}
        self.met: list[tuple[_Module, str]] = []  # and its text without comments
        self.places: dict[tuple[int, str], int] = {}

    def module(self, path: str) -> _Module:
        if path not in self.modules:
            dotted = path.removeprefix("kernels/").removesuffix(".py").replace("/", ".")
            self.modules[path] = _Module(dotted.rpartition(".")[0])
            self.modules[path].read(ast.parse(self.source(path)).body)
        return self.modules[path]

    def place(self, module: _Module, name: str) -> str:
        """What stands for a definition, which is to be looked through once."""
        key = (id(module), name)
        if key not in self.places:
            self.places[key] = len(self.met)
            self.met.append((module, "\n".join(map(ast.unparse, module.definitions[name]))))
        return f"@{self.places[key]}"

    def named(self, dotted: str) -> str:
        """What stands for an imported name: a place, a module's places, or itself where it is not ours.

        A module that is passed on as a value may be asked for anything, so all of it counts.
        """
        module = self._file(dotted)
        if module is not None:
            return str([self.place(module, name) for name in module.definitions])
        owner, _, name = dotted.rpartition(".")
        module = self._file(owner)
        if module is None:  # of the rest of the project a name and its module's, which may move
            return ".".join(dotted.split(".")[-2:]) if dotted.startswith("cats") else dotted
        if name in module.definitions:
            return self.place(module, name)
        return self.named(module.imports[name]) if name in module.imports else f"?{name}"

    def digest(self) -> str:
        """Twice through all that is reached: to find it and who is passed by keyword, then for the trees."""
        keywords: set[str] = set()
        for module, text in self.met:  # it grows on the way
            tree = ast.parse(text)
            keywords |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
            _Normal(self, module, keywords).visit(tree)
        trees = [_Normal(self, module, keywords).visit(ast.parse(text)) for module, text in self.met]
        return hashlib.sha256("\n".join(map(_written, trees)).encode()).hexdigest()

    def _file(self, dotted: str) -> _Module | None:
        if not any(dotted == each or dotted.startswith(f"{each}.") for each in _FOLLOWED):
            return None
        path = ("kernels/" if dotted.startswith("cats_kernels") else "") + dotted.replace(".", "/")
        files = (f"{path}.py", f"{path}/__init__.py")
        return next((self.module(file) for file in files if self.source(file) is not None), None)


class _Normal(ast.NodeTransformer):
    """A statement without what does not run: locals as numbers, other names as what they stand for."""

    def __init__(self, reached: _Reached, module: _Module, keywords: set[str]):
        self.reached, self.module, self.keywords = reached, module, keywords
        self.imports = dict(module.imports)
        self.locals: dict[str, str] | None = None  # of the outermost function; None outside of one
        self.methods: set[ast.AST] = set()  # called as attributes, so their names count
        self.classes = 0

    def visit_FunctionDef(self, node):
        if self.locals is not None:
            return self._function(node)
        self.locals = self._bound(node)
        self.imports = {key: value for key, value in self.imports.items() if key not in self.locals}
        for each in ast.walk(node):
            if isinstance(each, ast.Import | ast.ImportFrom):
                self.imports |= _imported(each, self.module.package)
        node = self._function(node)
        self.locals, self.imports = None, dict(self.module.imports)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef

    def _function(self, node):
        if not isinstance(node, ast.Lambda):
            node.returns, node.body = None, _running(node.body)
            if node not in self.methods:
                node.name = self._local(node.name)
        return self.generic_visit(node)

    def _bound(self, function) -> dict[str, str]:
        """What a function and those in it bind, numbered; a parameter passed by keyword keeps its name."""
        names, elsewhere = [], set()
        for node in ast.walk(function):
            if isinstance(node, ast.arg):
                names.append(node.arg)
            elif _stored(node):
                names.append(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
                names += [node.name] * (node is not function)
            elif isinstance(node, ast.Global):
                elsewhere |= set(node.names)
        own = [name for name in dict.fromkeys(names) if name not in elsewhere]
        kept = self.keywords & {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        return {name: name if name in kept else f"v{place}" for place, name in enumerate(own)}

    def _local(self, name: str) -> str:
        """A local's number; none for what a module defines, whose place stands for it."""
        return (self.locals or {}).get(name, "")

    def visit_ClassDef(self, node):
        node.name, node.body = self._local(node.name), _running(node.body)
        self.methods |= set(node.body)
        self.classes += 1
        node = self.generic_visit(node)
        self.classes -= 1
        return node

    def visit_ExceptHandler(self, node):
        node.name = node.name and self._local(node.name)
        return self.generic_visit(node)

    def visit_arg(self, node):
        node.arg = self._local(node.arg)
        hint = self._dotted(node.annotation) if node.annotation else None
        node.annotation = ast.Name(_SIGNATURE) if hint == _SIGNATURE else None
        return node

    def visit_AnnAssign(self, node):
        target, value = self.visit(node.target), node.value and self.visit(node.value)
        return ast.Assign([target], value) if value else ast.Expr(target)

    def visit_Raise(self, node):
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        node.exc, node.cause = kind and self.visit(kind), None
        return node

    def visit_Name(self, node):
        attribute = _stored(node) and self.locals is None and self.classes  # of a class
        if self.locals and node.id in self.locals and node.id not in self.imports:
            node.id = self.locals[node.id]
        elif node.id in self.imports:
            node.id = self.reached.named(self.imports[node.id])
        elif node.id in self.module.definitions and not attribute:
            node.id = self.reached.place(self.module, node.id)
        elif not attribute and not hasattr(builtins, node.id):
            node.id = f"?{node.id}"
        return node

    def visit_Attribute(self, node):
        """`module.name` is that module's definition; of any other value it is an attribute."""
        dotted = self._dotted(node)
        return self.generic_visit(node) if dotted is None else ast.Name(self.reached.named(dotted))

    def _dotted(self, node) -> str | None:
        """A chain of names that begins with an import, in full: tl.load → triton.language.load."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        known = self.imports.get(node.id) if isinstance(node, ast.Name) else None
        return None if known is None else ".".join([known, *reversed(parts)])


def _running(body: list[ast.stmt]) -> list[ast.stmt]:
    """Without docstrings, imports and declarations of names."""
    silent = (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Pass)
    bare = [isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) for each in body]
    return [
        each for each, nothing in zip(body, bare, strict=True) if not (nothing or isinstance(each, silent))
    ]


def _written(node) -> str:
    """A tree as text that is the same in every version of Python: `ast.dump` is not."""
    if isinstance(node, ast.AST):
        parts = [(name, value) for name, value in ast.iter_fields(node) if name != "ctx"]
        written = [f"{name}={_written(value)}" for name, value in parts if value is not None and value != []]
        return f"{type(node).__name__}({', '.join(written)})"
    return f"[{', '.join(map(_written, node))}]" if isinstance(node, list) else repr(node)


def _stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _imported(statement: ast.Import | ast.ImportFrom, package: str) -> dict[str, str]:
    """Name → dotted name for what an import binds."""
    if isinstance(statement, ast.Import):
        return {
            each.asname or each.name.split(".")[0]: each.name if each.asname else each.name.split(".")[0]
            for each in statement.names
        }
    origin = statement.module or ""
    if statement.level:
        base = package.split(".")
        origin = ".".join([*base[: len(base) + 1 - statement.level], *([origin] if origin else [])])
    return {each.asname or each.name: f"{origin}.{each.name}" for each in statement.names}

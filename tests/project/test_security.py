"""Nothing that is read can run code: what ruff's rules S do not look for, in modules and notebooks."""

import ast
import json
import tomllib
from pathlib import Path

import pytest
from repository import tracked

from cats import paths

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"yaml.unsafe_load", "yaml.full_load"}
# What a call must not be given unless it is False, and what it must be given as True.
FORBIDDEN = {"trust_remote_code", "allow_pickle"}
REQUIRED = {"torch.load": "weights_only"}


def sources() -> list[tuple[str, ast.Module]]:
    """Every Python file, and the code of every notebook, that is tracked."""
    found = [
        (file.relative_to(paths.ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8")))
        for file in tracked("*.py")
    ]
    return found + [(file.name, ast.parse(code(file))) for file in tracked("*.ipynb")]


def code(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = "\n".join(sources).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def faults(tree: ast.Module) -> list[str]:
    """The unsafe things in a module, each with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        unsafe = [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
        found += [f"line {node.lineno}: imports {name}" for name in unsafe]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        if name in UNSAFE_CALLS:
            found.append(f"line {node.lineno}: calls {name}")
        for word in FORBIDDEN:
            if word in given and not _is(given[word], False):
                found.append(f"line {node.lineno}: gives {word}={ast.unparse(given[word])}")
        if name in REQUIRED:
            word = REQUIRED[name]
            if not _is(given.get(word), True):
                found.append(f"line {node.lineno}: calls {name} without {word}=True")
    return found


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_source_does_anything_unsafe():
    found = [f"{name}, {fault}" for name, tree in sources() for fault in faults(tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "unsafe",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=flag)",
        "numpy.load(f, allow_pickle=True)",
        "yaml.unsafe_load(f)",
    ],
)
def test_the_search_finds_what_it_looks_for(unsafe):
    assert faults(ast.parse(unsafe))


@pytest.mark.parametrize("safe", ["torch.load(f, weights_only=True)", "numpy.load(f, allow_pickle=False)"])
def test_the_search_passes_what_is_safe(safe):
    assert not faults(ast.parse(safe))


def test_ruff_looks_for_the_rest():
    lint = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    ignored = {rule for rules in [lint["ignore"], *lint["per-file-ignores"].values()] for rule in rules}
    assert "S" in lint["select"]
    assert not ignored & {"S", "S102", "S301", "S307", "S501", "S506", "S602", "S605"}

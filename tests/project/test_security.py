"""Nothing that is read can run code: no pickle, no remote code, no shell strings, no unsafe YAML."""

import ast
import json
from pathlib import Path

import pytest
from repository import tracked

from cats import paths

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# What a call must not be given, and what it must.
FORBIDDEN = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "verify": False}
REQUIRED = {"torch.load": ("weights_only", True)}


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
        for word, value in FORBIDDEN.items():
            if word in given and not _is(given[word], not value):
                found.append(f"line {node.lineno}: gives {word}={ast.unparse(given[word])}")
        if name in REQUIRED:
            word, value = REQUIRED[name]
            if not _is(given.get(word), value):
                found.append(f"line {node.lineno}: calls {name} without {word}={value}")
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
        "yaml.load(f)",
        "subprocess.run(c, shell=True)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(unsafe):
    assert faults(ast.parse(unsafe))


@pytest.mark.parametrize("safe", ["torch.load(f, weights_only=True)", "yaml.safe_load(f)", "model.eval()"])
def test_the_search_passes_what_is_safe(safe):
    assert not faults(ast.parse(safe))

"""The corpus package-docs: docstrings of installed packages, tens of megabytes of English."""

import ast
import hashlib
import inspect
import json
import warnings
from importlib import metadata
from pathlib import Path

from tqdm.auto import tqdm

from cats import paths
from cats.errors import CatsError
from cats.paths import write_atomically

# Import name: distribution; each under a licence that lets its text be used for anything (BSD, MIT, Apache).
PACKAGES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "huggingface_hub": "huggingface-hub",
    "IPython": "ipython",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numba": "numba",
    "numpy": "numpy",
    "pandas": "pandas",
    "peft": "peft",
    "scipy": "scipy",
    "seaborn": "seaborn",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
_SHORTEST = 400  # characters: what is shorter is mostly names of arguments
_SKIPPED = {"tests", "test", "testing", "_vendor", "externals", "third_party"}


def package_docs() -> tuple[list[tuple[str, str]], dict]:
    """(key, text) of each module's docstrings, its own and its members', every paragraph of docstring once.

    Those of PACKAGES that are installed are read; `info` says which, with versions. The result is cached.
    Raises CatsError where none is installed.
    """
    versions = {}
    for package, distribution in PACKAGES.items():
        try:
            versions[package] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    if not versions:
        raise CatsError("None of the packages that package-docs reads is installed: use python-docs.")
    extra = {"licence": "BSD, MIT and Apache-2.0", "packages": versions}
    digest = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:12]
    cached = paths.CACHE / f"package-docs-{digest}.json"
    if cached.is_file():
        return [tuple(item) for item in json.loads(cached.read_text(encoding="utf-8"))], extra
    seen: set[str] = set()
    keyed = []
    for package in tqdm(versions, desc="reading docstrings", unit="package", disable=None):
        root = Path(str(metadata.distribution(PACKAGES[package]).locate_file(package)))
        for file in sorted(root.rglob("*.py")):
            name = file.relative_to(root.parent)
            if not _SKIPPED & set(name.parts):
                text = "\n\n".join(_docstrings(file, seen))
                if len(text) >= _SHORTEST:
                    keyed.append((name.as_posix(), text))
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cached, json.dumps(keyed).encode())
    return keyed, extra


def _docstrings(file: Path, seen: set[str]) -> list[str]:
    """The docstrings of a file that no file before it had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):  # a template, or another encoding
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text) >= 80 and text not in seen:
                seen.add(text)
                found.append(text)
    return found

"""The chapters as files: their order, their parameters cell, and what is kept of them after execution."""

import ast
import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from cats import paths
from cats.errors import CatsError, did_you_mean, explained
from cats.records import yaml_file

PARAMETERS = "parameters"
INJECTED = "injected-parameters"  # papermill's tag for the cell that overrides the parameters cell
_LISTED = 20  # more names than these are no sentence
KEPT_CELL_METADATA = {"tags", "mystnb", "jupyter", "editable"}


def names() -> list[str]:
    """The executable chapters, without suffix, in the order of the table of contents."""
    toc_file = paths.in_clone(paths.BOOK) / "_toc.yml"
    toc = yaml_file.read(toc_file, "table of contents")
    listed = [toc["root"], *_files(toc)]
    return [name for name in listed if path(name).exists()]


def path(name: str) -> Path:
    """The notebook of a chapter."""
    return paths.BOOK / f"{name}.ipynb"


def select(wanted: Iterable[str]) -> list[str]:
    """Chapters by name, number ("03") or file name; all if none is wanted. Raises CatsError if unknown."""
    known = names()
    chosen = set()
    for want in wanted:
        stem = Path(want).name.removesuffix(".ipynb")
        matches = [name for name in known if name == stem or name.split("_")[0] == stem.zfill(2)]
        if not matches:
            raise CatsError(f"There is no chapter {want!r}{_suggest(stem, known)}.")
        chosen.update(matches)
    return [name for name in known if not chosen or name in chosen]


def read(file: Path) -> NotebookNode:
    """A notebook; CatsError where it is not one."""
    with explained(f"The chapter {file} is not a whole notebook", "restore it with git"):
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)  # reading one only logs what is wrong
        return notebook


def write(notebook: NotebookNode, file: Path) -> None:
    """Write to a temporary name beside `file`, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise CatsError(f"{file} cannot be written: {(error.strerror or str(error)).lower()}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def parameters(notebook: NotebookNode) -> dict:
    """Names and default values of the cell tagged `parameters`; CatsError if it holds more than literals."""
    cells = [cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", [])]
    if len(cells) > 1:
        raise CatsError(f"A chapter has {len(cells)} cells tagged {PARAMETERS!r}: keep one.")
    return assignments(cells[0].source) if cells else {}


def all_parameters() -> set[str]:
    """The parameter names of the whole book: a params file serves every chapter."""
    return {name for chapter in names() for name in parameters(read(path(chapter)))}


def assignments(source: str) -> dict:
    """Names and values of a cell that only assigns literals, annotated or not."""
    values = {}
    with explained("A parameters cell is not Python", "restore the chapter with git"):
        body = ast.parse(source).body
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        try:
            values[targets[0].id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError) as error:
            raise CatsError(f"A parameters cell may only assign literals: {ast.unparse(node)!r}") from error
    return values


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises CatsError for the first of `given` that is no parameter of any chapter concerned."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise CatsError(f"Unknown parameter {name!r} in {where}{_suggest(name, known)}.")


def check_parameters(namespace: dict) -> None:
    """Called by a chapter with `globals()`: CatsError if papermill injected a name that no chapter has.

    papermill itself only prints a line and goes on with the default. A params file serves the whole book,
    so a parameter of another chapter is fine.
    """
    known = all_parameters()
    for source in namespace.get("In", []):
        if source.startswith("# Parameters\n"):
            check_names(assignments(source), known, "the parameters given to papermill")


def code_hash(notebook: NotebookNode) -> str:
    """sha256 of the code cells: stored at execution, so that outputs can be held against the present code."""
    return _hash([cell.source for cell in notebook.cells if cell.cell_type == "code"])


def problems(notebook: NotebookNode) -> list[str]:
    """What is wrong with the stored outputs of a chapter, a phrase each; none if it can be rendered."""
    found = []
    if notebook.metadata.get("cats", {}).get("code_sha256") != code_hash(notebook):
        found.append("its outputs are not those of its present code: run `cats reproduce --in-place`")
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        kinds = {output.output_type for output in cell.outputs}
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"its code cell {number} was not executed")
        if "error" in kinds:
            found.append(f"its code cell {number} ended with an error")
        if any(output.get("name") == "stderr" for output in cell.outputs):
            found.append(f"its code cell {number} shows warnings")
    return found


def cells_hash(notebook: NotebookNode) -> str:
    """sha256 of all cells, prose and tags too: whether a page has to be made again."""
    return _hash([[cell.cell_type, cell.source, cell.metadata] for cell in notebook.cells])


def bare(notebook: NotebookNode) -> NotebookNode:
    """A copy without outputs and without parameters injected by an earlier run."""
    copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
    copy.cells = [cell for cell in copy.cells if INJECTED not in cell.metadata.get("tags", [])]
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    copy.metadata.pop("cats", None)
    return copy


def strip(notebook: NotebookNode) -> NotebookNode:
    """Drop, in place, what differs between two equal runs: timestamps, paths, widget state, stderr."""
    for cell in notebook.cells:
        kept = {key: value for key, value in cell.metadata.items() if key in KEPT_CELL_METADATA}
        cell.metadata = {key: value for key, value in kept.items() if value}  # papermill leaves empty tags
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _files(node) -> list[str]:
    """Every `file:` of a table of contents, in reading order."""
    if isinstance(node, list):
        return [name for item in node for name in _files(item)]
    if not isinstance(node, dict):
        return []
    own = [node["file"]] if "file" in node else []
    return own + [name for key in ("parts", "chapters", "sections") for name in _files(node.get(key))]


def _hash(content: list) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _suggest(name: str, known: list[str]) -> str:
    near = did_you_mean(name, known)
    if not near and len(known) > _LISTED:
        [nearest] = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
        return f": the nearest of {len(known)} is {nearest}"
    return near or f": use one of {', '.join(known)}"

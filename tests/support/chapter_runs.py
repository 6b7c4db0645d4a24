"""What a chapter must be after a run on tiny parameters; two test files share them, so that two cores do."""

from cats.book import chapters, reproduce

CHAPTERS = chapters.names()


def code(notebook):
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and chapters.INJECTED not in cell.metadata.get("tags", [])
    ]


def glued(notebook) -> set[str]:
    return {
        output.metadata["scrapbook"]["name"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "scrapbook" in output.get("metadata", {})
    }


def check(name: str, folder) -> None:
    """Run a chapter under the profile `smoke`, its output to `folder`, and look at what it shows."""
    reproduce.reproduce([name], profile="smoke", output=folder)
    executed = chapters.read(folder / f"{name}.ipynb")
    assert chapters.problems(executed) == []
    for cell in code(executed):
        if "figure" in cell.metadata.get("mystnb", {}):
            images = [out for out in cell.outputs if "image/svg+xml" in out.get("data", {})]
            assert len(images) == 1, cell.source
    assert glued(executed) == glued(chapters.read(chapters.path(name)))
    assert any("text/html" in out.get("data", {}) for cell in code(executed) for out in cell.outputs)
    injected = [cell.source for cell in executed.cells if chapters.INJECTED in cell.metadata.get("tags", [])]
    if name == "01_activations":
        assert len(injected) == 1 and "activation_tokens = " in injected[0]

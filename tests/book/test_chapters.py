"""The chapters as committed, and as they run on tiny parameters."""

import copy
import json
import re

import nbformat
import papermill
import pytest
from chapter_runs import code, glued

from cats import paths
from cats.book import chapters, reproduce
from cats.errors import CatsError

CHAPTERS = chapters.names()
PROFILES = sorted(file.stem for file in reproduce.PARAMS.glob("*.yml"))
GLUED = re.compile(r"\{glue:text\}`(?:(?P<page>[\w.]+)::)?(?P<key>\w+)(?::[^`]+)?`")
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|work|opt|mnt|Users|private)/")


def markdown(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@pytest.fixture(params=CHAPTERS)
def committed(request):
    return chapters.read(chapters.path(request.param))


def test_parameters_come_first_are_literals_typed_and_commented(committed):
    first = code(committed)[0]
    assert chapters.PARAMETERS in first.metadata.tags
    assert chapters.parameters(committed)
    for line in first.source.splitlines():
        assert re.fullmatch(r"\w+: (str|int|float|bool|list) = .+  # \S.*", line), line


def test_parameters_are_checked_before_any_work_and_provenance_comes_last(committed):
    cells = code(committed)
    assert "notebook.begin(globals())" in cells[1].source
    assert "notebook.end(" in cells[-1].source


@pytest.mark.parametrize("name", [name for name in CHAPTERS if name[0].isdigit()])
def test_a_box_comes_first_what_to_take_away_last_and_the_code_is_short(name):
    """At most 150 lines of code; the box stands under the title, before anything but the set-up."""
    committed = chapters.read(chapters.path(name))
    cells = code(committed)
    assert cells[2].metadata.tags == ["box", "remove-input"]
    assert [cell.cell_type for cell in committed.cells[:4]] == ["markdown", "code", "code", "code"]
    headings = re.findall(r"^## (.+)$", "\n".join(markdown(committed)), re.MULTILINE)
    assert headings[-1] == "What to take away"
    assert sum(len(cell.source.splitlines()) for cell in cells) <= 150


def test_papermill_sees_every_parameter(committed, tmp_path):
    file = tmp_path / "chapter.ipynb"
    chapters.write(committed, file)
    assert set(papermill.inspect_notebook(file)) == set(chapters.parameters(committed))


def test_figures_have_a_name_a_caption_and_a_description(committed):
    figures = [cell for cell in code(committed) if "figure = " in cell.source]
    assert len(figures) <= 6
    names = [cell.metadata.mystnb.figure.name for cell in figures]
    assert len(names) == len(set(names))
    for cell in figures:
        assert len(cell.metadata.mystnb.figure.caption) > 60 and len(cell.metadata.mystnb.image.alt) > 20


def test_stored_outputs_belong_to_the_present_code(committed):
    assert chapters.problems(committed) == []


def test_stored_outputs_are_small_and_hold_no_path_of_a_machine(committed):
    outputs = json.dumps([cell.outputs for cell in code(committed)])
    assert len(outputs) < 2_000_000
    assert not ABSOLUTE.search(outputs) and "\\u001b[" not in outputs and "it/s]" not in outputs


def test_lines_fit_the_page(committed):
    for cell in code(committed):
        assert all(len(line) <= 80 for line in cell.source.splitlines()), cell.source


def test_a_changed_cell_a_warning_and_an_error_are_noticed(committed):
    changed = copy.deepcopy(committed)
    code(changed)[-1].source += "\nprint(1)"
    assert "outputs are not those" in chapters.problems(changed)[0]
    noisy = copy.deepcopy(committed)
    code(noisy)[0].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="UserWarning"),
        nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[]),
    ]
    found = " ".join(chapters.problems(noisy))
    assert "ended with an error" in found and "shows warnings" in found
    assert any("not executed" in problem for problem in chapters.problems(chapters.bare(committed)))


def test_every_value_shown_on_a_page_is_glued_by_the_notebook_that_it_names():
    known = {f"{name}.ipynb": glued(chapters.read(chapters.path(name))) for name in CHAPTERS}
    pages = {file.name: file.read_text(encoding="utf-8") for file in paths.BOOK.glob("*.md")}
    for name in CHAPTERS:
        cells = chapters.read(chapters.path(name)).cells
        pages[f"{name}.ipynb"] = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    found = 0
    for page, text in pages.items():
        for match in GLUED.finditer(text):
            source = match["page"] or page
            assert match["key"] in known[source], f"{page} shows {match[0]}"
            found += 1
    assert found > 20


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_name_parameters_that_chapters_have_in_their_types(profile):
    given = reproduce.load_profile(profile)
    assert given
    chapters.check_names(given, chapters.all_parameters(), profile)
    for name in CHAPTERS:
        reproduce._check_types(given, chapters.parameters(chapters.read(chapters.path(name))))


def test_there_is_a_profile_for_each_model_of_the_paper():
    wanted = {
        "smoke",
        "cpu",
        "gpu",
        "llama-2-7b",
        "llama-2-13b",
        "llama-2-70b",
        "llama-2-7b-chat",
        "mistral-7b",
    }
    assert wanted <= set(PROFILES)


def test_a_parameter_means_the_same_in_every_chapter():
    seen = {}
    for name in CHAPTERS:
        for parameter, value in chapters.parameters(chapters.read(chapters.path(name))).items():
            assert type(seen.setdefault(parameter, value)) is type(value), parameter


def test_papermill_alone_stops_at_an_unknown_parameter_before_any_work(tmp_path):
    with pytest.raises(papermill.exceptions.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            chapters.path("03_perplexity"),
            tmp_path / "out.ipynb",
            parameters={"sparsites": [0.5]},
            cwd=tmp_path,
            progress_bar=False,
        )
    assert caught.value.ename == "CatsError"
    assert (
        "Unknown parameter 'sparsites'" in caught.value.evalue
        and "did you mean sparsities" in caught.value.evalue
    )
    assert caught.value.exec_count <= 3


def test_parameters_of_another_chapter_are_accepted_and_others_refused():
    chapters.check_parameters({"In": ["", "# Parameters\nheldout_rows = 5\n"]})
    with pytest.raises(CatsError, match="Unknown parameter 'heldout_row'"):
        chapters.check_parameters({"In": ["", "# Parameters\nheldout_row = 5\n"]})


@pytest.mark.parametrize("source", ["a = f()", "import os", "a = b", "print(1)"])
def test_a_parameters_cell_that_computes_is_refused(source):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source, metadata={"tags": [chapters.PARAMETERS]})]
    )
    with pytest.raises(CatsError, match="may only assign literals"):
        chapters.parameters(notebook)


def test_chapters_are_chosen_by_number_name_and_file():
    first = CHAPTERS[0]
    for want in (first, first.split("_")[0], first.split("_")[0].lstrip("0"), f"book/{first}.ipynb"):
        assert chapters.select([want]) == [first]
    assert chapters.select([]) == CHAPTERS
    with pytest.raises(CatsError, match="There is no chapter '99'"):
        chapters.select(["99"])


def test_a_damaged_chapter_is_a_clear_error(tmp_path):
    file = tmp_path / "broken.ipynb"
    file.write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(CatsError, match="not a whole notebook"):
        chapters.read(file)


def test_stripping_leaves_nothing_volatile():
    notebook = chapters.read(chapters.path(CHAPTERS[0]))
    cell = code(notebook)[1]
    cell.metadata["papermill"] = {"start_time": "2026-01-01"}
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text="noise")]
    notebook.metadata["widgets"] = {"state": {}}
    notebook.metadata["papermill"] = {"output_path": "/somewhere"}
    chapters.strip(notebook)
    assert "papermill" not in cell.metadata and cell.outputs == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}

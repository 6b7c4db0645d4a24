"""Running chapters, on a book of two tiny ones."""

import json
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import yaml

from cats import paths
from cats.book import chapters, reproduce
from cats.errors import CatsError

TOC = {
    "format": "jb-book",
    "root": "index",
    "parts": [{"chapters": [{"file": "01_first"}, {"file": "02_second"}]}],
}


def notebook(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = [chapters.PARAMETERS]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A project of its own, its path with a space in it."""
    root = tmp_path / "a project"
    folder = root / "book"
    (folder / "params").mkdir(parents=True)
    (folder / "_toc.yml").write_text(yaml.safe_dump(TOC), encoding="utf-8")
    (folder / "index.md").write_text("# Start\n", encoding="utf-8")
    (folder / "params" / "cpu.yml").write_text("number: 1\n", encoding="utf-8")
    (folder / "params" / "other.yml").write_text("number: 5\nword: other\n", encoding="utf-8")
    (root / "_config.yml").write_text("title: tiny\n", encoding="utf-8")
    (root / "data").mkdir()
    (root / "requirements.lock").write_text("", encoding="utf-8")
    first = notebook("number: int = 1  # a number\nshare: float = 0.5  # a share", "print(number + 1)")
    second = notebook('word: str = "book"  # a word\nnumber: int = 1  # a number', "print(word * number)")
    for name, content in (("01_first", first), ("02_second", second)):
        chapters.write(content, folder / f"{name}.ipynb")
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(paths, "BOOK", folder)
    monkeypatch.setattr(reproduce, "PARAMS", folder / "params")
    monkeypatch.setattr(reproduce, "LIVE", root / "_build" / "live")
    reproduce._inputs_hash.cache_clear()
    yield folder
    reproduce._inputs_hash.cache_clear()


def printed(file) -> str:
    return "".join(out.text for cell in chapters.read(file).cells for out in cell.outputs)


def test_a_kernel_that_does_not_start_is_started_again(book, tmp_path, monkeypatch):
    """Kernels that start at once can draw one port; Jupyter says that the later one died."""
    execute, failures = reproduce.papermill.execute_notebook, ["once"]

    def unlucky(*given, **options):
        if failures:
            failures.pop()
            raise RuntimeError("Kernel died before replying to kernel_info")
        return execute(*given, **options)

    monkeypatch.setattr(reproduce.papermill, "execute_notebook", unlucky)
    [run] = reproduce.reproduce(["01"], output=tmp_path / "out")
    assert printed(run.file) == "2\n" and not failures


def test_runs_every_chapter_under_a_profile_and_leaves_the_committed_ones(book, tmp_path):
    runs = reproduce.reproduce(profile="other", output=tmp_path / "out")
    assert [run.chapter for run in runs] == ["01_first", "02_second"]
    assert all(run.seconds > 0 and run.peak_gb > 0 for run in runs)
    assert printed(tmp_path / "out" / "01_first.ipynb") == "6\n"
    assert printed(tmp_path / "out" / "02_second.ipynb") == "other" * 5 + "\n"
    assert printed(book / "01_first.ipynb") == ""


def test_chapters_at_a_time_give_what_one_after_another_gives(book, tmp_path, capfd):
    runs = reproduce.reproduce(profile="other", output=tmp_path / "out", jobs=2)
    assert [run.chapter for run in runs] == ["01_first", "02_second"]
    assert printed(tmp_path / "out" / "01_first.ipynb") == "6\n"
    assert printed(tmp_path / "out" / "02_second.ipynb") == "other" * 5 + "\n"
    lines = capfd.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == ["01_first", "02_second"]


def test_parameters_go_over_the_profile(book, tmp_path):
    reproduce.reproduce(["02"], profile="other", parameters={"word": "x"}, output=tmp_path)
    assert printed(tmp_path / "02_second.ipynb") == "xxxxx\n"


def test_in_place_replaces_the_committed_chapter_with_outputs_of_its_code(book):
    reproduce.reproduce(["01"], in_place=True)
    kept = chapters.read(book / "01_first.ipynb")
    assert printed(book / "01_first.ipynb") == "2\n" and chapters.problems(kept) == []
    assert not list(book.glob(".*"))


def test_the_default_lays_out_a_book_that_can_be_built(book):
    reproduce.reproduce(["01"])
    live = paths.ROOT / "_build" / "live"
    assert (live / "_config.yml").read_text(encoding="utf-8") == "title: tiny\n" and (live / "data").is_dir()
    assert (live / "book" / "index.md").exists() and (live / "book" / "01_first.ipynb").exists()


def test_what_is_up_to_date_is_kept_until_forced_or_changed(book, tmp_path):
    reproduce.reproduce(["01"], output=tmp_path)
    before = (tmp_path / "01_first.ipynb").stat().st_mtime_ns
    (kept,) = reproduce.reproduce(["01"], output=tmp_path)
    assert kept.seconds is None and "up to date" in str(kept)
    assert (tmp_path / "01_first.ipynb").stat().st_mtime_ns == before
    (again,) = reproduce.reproduce(["01"], output=tmp_path, parameters={"number": 7})
    assert again.seconds is not None and printed(tmp_path / "01_first.ipynb") == "8\n"
    (forced,) = reproduce.reproduce(["01"], output=tmp_path, parameters={"number": 7}, force=True)
    assert forced.seconds is not None


def test_a_changed_library_or_data_makes_a_chapter_anew(book, tmp_path):
    reproduce.reproduce(["01"], output=tmp_path)
    (paths.ROOT / "data" / "new.csv").write_text("a\n1\n", encoding="utf-8")
    reproduce._inputs_hash.cache_clear()
    (run,) = reproduce.reproduce(["01"], output=tmp_path)
    assert run.seconds is not None


def test_a_failing_chapter_says_where_and_why_and_replaces_nothing(book, tmp_path):
    reproduce.reproduce(["01"], output=tmp_path)
    good = (tmp_path / "01_first.ipynb").read_bytes()
    bad = notebook("number: int = 1  # a number", "1 / 0")
    chapters.write(bad, book / "01_first.ipynb")
    with pytest.raises(
        CatsError, match=r"chapter 01_first failed in its cell \[2\], which starts '1 / 0': ZeroDivision"
    ):
        reproduce.reproduce(["01"], output=tmp_path)
    assert (tmp_path / "01_first.ipynb").read_bytes() == good


def test_a_sentence_of_the_library_is_shown_as_it_is(book, tmp_path):
    # chapters raise the library's own, which takes longest to import: what counts is its name
    raising = 'class CatsError(Exception): pass\nraise CatsError("The corpus is empty: use another.")'
    chapters.write(notebook("number: int = 1  # a number", raising), book / "01_first.ipynb")
    with pytest.raises(CatsError) as caught:
        reproduce.reproduce(["01"], output=tmp_path)
    assert "The corpus is empty: use another." in str(caught.value) and "CatsError: " not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wanted": ["03"]}, "There is no chapter '03'"),
        ({"profile": "gpus"}, "There is no profile 'gpus': use one of cpu, other"),
        ({"parameters": {"numbers": 2}}, "Unknown parameter 'numbers' in -p \\(did you mean number\\?\\)"),
        ({"wanted": ["01"], "parameters": {"word": "x"}}, "Unknown parameter 'word' in -p"),
        ({"parameters": {"number": "two"}}, "The parameter number is 'two', but must be an int"),
        ({"parameters": {"number": 2.5}}, "must be an int"),
        ({"parameters": {"number": True}}, "must be an int"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(book, tmp_path, options, message):
    with pytest.raises(CatsError, match=message):
        reproduce.reproduce(**options, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("numbr: 2\n", "Unknown parameter 'numbr'"),
        ("- 1\n- 2\n", "must map parameter names"),
        ("a: [1\n", "not valid YAML"),
    ],
)
def test_a_wrong_profile_is_refused_before_anything_runs(book, tmp_path, text, message):
    file = tmp_path / "mine.yml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(CatsError, match=message):
        reproduce.reproduce(profile=str(file), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_int_serves_where_a_float_is_asked(book, tmp_path):
    (run,) = reproduce.reproduce(["01"], parameters={"share": 1}, output=tmp_path)
    assert run.seconds is not None


def test_parameters_of_a_shell_are_read_as_yaml():
    parsed = reproduce.parse_parameters(["a=1", "b=[0.5, 0.7]", "c=text", "d=", "e=true"])
    assert parsed == {"a": 1, "b": [0.5, 0.7], "c": "text", "d": None, "e": True}
    with pytest.raises(CatsError, match="'a' has no value"):
        reproduce.parse_parameters(["a"])
    with pytest.raises(CatsError, match="is not valid YAML"):
        reproduce.parse_parameters(["a=[1"])


SLEEPER = """
import pathlib, time
pathlib.Path("begun").touch()
while True:
    time.sleep(0.1)
    pathlib.Path("alive").touch()
"""
RUN = """
import pathlib, sys, threading
import cats_cli
from cats import paths
from cats.book import reproduce

root = pathlib.Path(sys.argv[1])
paths.ROOT, paths.BOOK = root, root / "book"
reproduce.PARAMS, reproduce.LIVE = root / "book" / "params", root / "_build" / "live"
if __name__ == "__main__":
    sys.exit(cats_cli.main(["reproduce", *sys.argv[2:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ends with its parent on Linux only")
@pytest.mark.parametrize(
    ("how", "jobs"), [(signal.SIGINT, "2"), (signal.SIGTERM, "1"), (signal.SIGKILL, "2")]
)
def test_a_killed_run_leaves_no_kernel_and_no_worker(book, tmp_path, how, jobs):
    chapters.write(notebook("number: int = 1  # a number", SLEEPER), book / "01_first.ipynb")
    program = tmp_path / "run.py"
    program.write_text(RUN)
    output = tmp_path / "out"
    command = [sys.executable, program, book.parent, "01", "--output", output, "--jobs", jobs]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (output / "begun").exists():
        assert started.poll() is None
        time.sleep(0.1)
    children = psutil.Process(started.pid).children(recursive=True)
    assert children
    started.send_signal(how)
    assert started.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    _, left = psutil.wait_procs(children, timeout=20)
    assert not left
    (output / "alive").unlink(missing_ok=True)
    time.sleep(0.5)
    assert not (output / "alive").exists()


def test_another_pythons_kernel_of_that_name_is_not_used(book, tmp_path, monkeypatch):
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    false = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(false))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    [run] = reproduce.reproduce(["01"], output=tmp_path / "out")
    assert printed(run.file) == "2\n"


def test_only_the_output_is_written(book, tmp_path):
    output = tmp_path / "out"
    before = sorted(paths.ROOT.rglob("*"))
    reproduce.reproduce(["01"], output=output)
    assert sorted(paths.ROOT.rglob("*")) == before
    assert [file.name for file in output.iterdir()] == ["01_first.ipynb"]


def test_a_project_below_a_folder_called_build_is_copied_whole(book, tmp_path, monkeypatch):
    root = tmp_path / "_build" / "project"
    root.parent.mkdir()
    shutil.move(paths.ROOT, root)
    for module, name, place in ((paths, "ROOT", root), (paths, "BOOK", root / "book")):
        monkeypatch.setattr(module, name, place)
    monkeypatch.setattr(reproduce, "PARAMS", root / "book" / "params")
    monkeypatch.setattr(reproduce, "LIVE", root / "_build" / "live")
    reproduce.reproduce(["01"])
    assert (root / "_build" / "live" / "book" / "index.md").is_file()

"""`make site`: what is not whole is never put in place, and an interrupted build leaves the old site."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cats import paths

sys.path.insert(0, str(paths.ROOT / "scripts"))
import check_site

PAGE = '<html><body><img src="_images/a.svg"><img src="data:,"><img src="https://example.org/b.png"></body></html>'


def make_site(
    folder: Path, *, pages=("index", "one"), indexed=("index", "one"), picture: str = "<svg/>"
) -> Path:
    """A site of two pages with a picture each, as Sphinx lays it out."""
    (folder / "_sources").mkdir(parents=True)
    (folder / "_images").mkdir()
    (folder / "_images" / "a.svg").write_text(picture)
    for page in pages:
        (folder / f"{page}.html").write_text(PAGE)
        (folder / "_sources" / f"{page}.md").write_text("# A page\n")
    (folder / "searchindex.js").write_text(f"Search.setIndex({json.dumps({'docnames': list(indexed)})})")
    return folder


def test_a_whole_site_has_no_faults(tmp_path):
    assert check_site.faults(make_site(tmp_path / "site")) == []


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"picture": ""}, "shows _images/a.svg"),
        ({"indexed": ("index",)}, "search index lacks the page one"),
        ({"pages": ("one",), "indexed": ("one",)}, "no index.html"),
    ],
)
def test_what_is_missing_is_named(tmp_path, options, fault):
    assert fault in " ".join(check_site.faults(make_site(tmp_path / "site", **options)))


@pytest.mark.parametrize("text", ["", "Search.setIndex({", "Search.setIndex([1])", "Search.setIndex({})"])
def test_a_damaged_search_index_is_a_fault(tmp_path, text):
    site = make_site(tmp_path / "site")
    (site / "searchindex.js").write_text(text)
    assert check_site.faults(site) == ["its search index cannot be read"]


@pytest.fixture
def clone(tmp_path) -> Path:
    """The scripts in a folder whose name a shell would run, with a jupyter-book that copies `source`."""
    root = tmp_path / "$(touch X) 'a\" clone"
    shutil.copytree(paths.ROOT / "scripts", root / "scripts")
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy2(paths.ROOT / name, root / name)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    jupyter_book = programs / "jupyter-book"
    jupyter_book.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --path-output ]; do shift; done\n'
        'mkdir -p "$2/_build" && cp -R source/half "$2/_build/html"\n'
        "[ -e wait ] && touch begun && sleep 60\n"
        'rm -r "$2/_build/html" && cp -R source/whole "$2/_build/html"\n'
    )
    jupyter_book.chmod(0o755)
    make_site(root / "source" / "half", pages=("index",), picture="")
    make_site(root / "source" / "whole")
    return root


def start(clone: Path) -> subprocess.Popen:
    command = ["bash", "scripts/site.sh"]
    return subprocess.Popen(
        command,
        cwd=clone,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"HOME": str(clone)},
    )


def build(clone: Path) -> tuple[int, str]:
    process = start(clone)
    return process.wait(), process.stderr.read()


def test_a_build_replaces_the_old_site(clone):
    make_site(clone / "_build" / "html")
    (clone / "_build" / "html" / "old.html").write_text("")
    assert build(clone) == (0, "")
    assert not (clone / "_build" / "html" / "old.html").exists()
    assert [file.name for file in (clone / "_build").iterdir()] == ["html"]
    assert not (clone / "X").exists()


def test_a_site_that_is_not_whole_is_not_put_in_place(clone):
    (clone / "source" / "whole" / "_images" / "a.svg").unlink()
    make_site(clone / "_build" / "html")
    status, said = build(clone)
    assert status == 1 and said.startswith("make: the site is not whole") and said.count("\n") == 1
    assert check_site.faults(clone / "_build" / "html") == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_the_old_site_and_the_next_one_is_whole(clone, how):
    make_site(clone / "_build" / "html")
    (clone / "wait").touch()
    process = start(clone)
    for _ in range(600):
        if (clone / "begun").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, how)
    assert process.wait() != 0
    process.stderr.close()
    assert check_site.faults(clone / "_build" / "html") == []
    (clone / "wait").unlink()
    assert build(clone) == (0, "")
    assert check_site.faults(clone / "_build" / "html") == []
    assert [file.name for file in (clone / "_build").iterdir()] == ["html"]

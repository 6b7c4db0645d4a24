"""The scripts behind the two commands: a missing prerequisite is one sentence, from any path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cats import paths

TOOLS = [
    *("bash", "sh", "dirname", "mkdir", "printf", "tail", "cat", "df", "awk", "grep", "sed"),
    *("sha256sum", "cut", "flock", "tee", "rm"),
]


@pytest.fixture
def clone(tmp_path) -> Path:
    """The scripts and what they read, in a folder with a space in its name, without an environment."""
    root = tmp_path / "a clone"
    shutil.copytree(paths.ROOT / "scripts", root / "scripts")
    for name in ("requirements.lock", "requirements-cuda.lock", "pyproject.toml", "Makefile"):
        shutil.copy2(paths.ROOT / name, root / name)
    return root


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder for PATH that has the usual tools and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return folder


def run(script: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """A script, started from another folder; HOME is one that can be written."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [shutil.which("bash"), str(script)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **environment},
        capture_output=True,
        text=True,
    )


def program(file: Path, text: str) -> Path:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def one_sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode != 0
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("make: ")
    assert line.endswith(".")
    return line


@pytest.mark.parametrize("script", ["environment.sh", "book.sh", "test.sh"])
def test_no_python(clone, bare, tmp_path, script):
    done = run(clone / "scripts" / script, tmp_path, PATH=str(bare))
    assert "python3 was not found" in one_sentence(done)


def test_an_old_python_is_named(clone, bare, tmp_path):
    program(bare / "python3", 'case "$*" in *--version*) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    done = run(clone / "scripts" / "environment.sh", tmp_path, PATH=str(bare))
    assert "found only Python 3.9.2" in one_sentence(done)


def test_a_python_without_venv_module(clone, bare, tmp_path):
    program(bare / "python3", f'case "$*" in *ensurepip*) exit 1 ;; *) exec "{sys.executable}" "$@" ;; esac')
    done = run(clone / "scripts" / "environment.sh", tmp_path, PATH=str(bare))
    assert "no venv module" in one_sentence(done)


def test_a_python_chosen_by_name_that_is_not_there(clone, tmp_path):
    done = run(clone / "scripts" / "environment.sh", tmp_path, PYTHON="/no where/python3")
    assert "/no where/python3 was not found" in one_sentence(done)


def test_too_little_disk_is_said_before_the_work(clone, bare, tmp_path):
    (bare / "df").unlink()
    program(bare / "df", 'printf "header\\ndisk 1 1 50 1%% /\\n"')
    program(bare / "python3", f'exec "{sys.executable}" "$@"')
    done = run(clone / "scripts" / "environment.sh", tmp_path, PATH=str(bare))
    assert "only 50 MB of disk are free" in one_sentence(done)
    assert not (clone / ".venv").exists()


def test_no_network(clone, tmp_path):
    """A proxy that refuses: pip's own words stay in the log."""
    nowhere = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    script = clone / "scripts" / "environment.sh"
    done = run(script, tmp_path, **nowhere, PIP_CONFIG_FILE=os.devnull, PYTHON=sys.executable)
    assert "cannot reach the package index" in one_sentence(done)
    assert (clone / ".venv" / "install.log").is_file()
    assert not (clone / ".venv" / "installed.txt").exists()  # the next run goes on


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "is not the file that requirements.lock names"),
        ("ERROR: No matching distribution found", "pip could not install requirements.lock: ERROR: No match"),
    ],
)
def test_pip_failures_are_explained(clone, bare, tmp_path, words, sentence):
    fake = f"""case "$*" in
        *"pip install"*) echo '{words}'; exit 1 ;;
        *"-m venv"*) mkdir -p .venv/bin && ln -sf "$0" .venv/bin/python ;;
    esac"""
    program(bare / "ln", f'exec {shutil.which("ln")} "$@"')
    program(bare / "python3", fake)
    done = run(clone / "scripts" / "environment.sh", tmp_path, PATH=str(bare))
    assert sentence in one_sentence(done)


def test_a_home_that_cannot_be_written_is_replaced(clone, bare, tmp_path):
    done = run(clone / "scripts" / "environment.sh", tmp_path, PATH=str(bare), HOME=str(tmp_path / "absent"))
    note, reason = done.stderr.strip().splitlines()
    assert "home folder cannot be written" in note
    assert "was not found" in reason
    assert (clone / ".cache" / "home").is_dir()


def test_an_environment_that_is_current_is_left_alone(clone, bare, tmp_path):
    """The second run of a command starts at once: no pip, no Python but for its version."""
    environment = clone / ".venv" / "bin"
    environment.mkdir(parents=True)
    program(environment / "python", "echo Python 3.12.1")
    calls = 'cat requirements.lock requirements-cuda.lock pyproject.toml | sha256sum | cut -d" " -f1'
    digest = subprocess.run(["bash", "-c", calls], cwd=clone, capture_output=True, text=True).stdout.strip()
    (clone / ".venv" / "installed.txt").write_text(f"{clone} {digest} Python 3.12.1\n")
    done = run(clone / "scripts" / "environment.sh", tmp_path, PATH=str(bare))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (clone / "requirements.lock").write_text("another==1\n")
    done = run(clone / "scripts" / "environment.sh", tmp_path, PATH=str(bare))
    assert "was not found" in one_sentence(done)


def test_make_starts_from_any_folder(clone, tmp_path):
    done = subprocess.run(
        ["make", "--silent", "-C", str(clone), "help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert {"make book", "make test"} <= {" ".join(line.split()[:2]) for line in done.stdout.splitlines()}


def test_a_link_in_place_of_the_environment_is_left_alone(clone, tmp_path):
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (clone / ".venv").symlink_to(other)
    done = run(clone / "scripts" / "environment.sh", tmp_path, PYTHON=sys.executable)
    assert ".venv is a link to" in one_sentence(done)
    assert (other / "bin").is_dir()

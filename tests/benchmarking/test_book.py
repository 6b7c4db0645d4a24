"""What the two commands take: targets of make in a fresh clone, of a project that has two quick ones."""

import subprocess

import pytest

import cats_cli
from cats import cli, paths
from cats.errors import CatsError
from cats.records import record

MAKEFILE = "book:\n\t@touch made && test ! -e uncommitted\ntest:\n\t@test -e made\nbroken:\n\t@exit 3\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "project"
    root.mkdir()
    (root / "Makefile").write_text(MAKEFILE)
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "uncommitted").touch()
    monkeypatch.setattr(paths, "ROOT", root)
    return tmp_path


def measure(folder, *targets):
    options = ["measure", "book", "--targets", *targets, "--slug", "toy", "--output", str(folder)]
    cli.measure(cats_cli.parser().parse_args(options))


def test_targets_run_in_a_fresh_clone_and_are_recorded(project):
    measure(project / "records", "book", "book", "test")
    rows = record.read("build", folder=project / "records").rows
    assert rows.step.tolist() == ["make book", "make book, again", "make test"]
    assert (rows.seconds >= 0).all() and (rows.cores >= 1).all() and rows.memory_gb.notna().all()


def test_a_target_that_fails_ends_the_measurement(project):
    with pytest.raises(CatsError, match="make broken ended with 2 in a fresh clone"):
        measure(project / "records", "broken", "book")
    assert not (project / "records").exists()

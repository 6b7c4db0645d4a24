"""A source archive is fetched as data: pip runs none of its code."""

import hashlib
import os
import tarfile

import pytest

from cats.models import fetch
from cats.models.archives import Part, Source

SETUP = "open({marker!r}, 'w')\nfrom setuptools import setup\nsetup(name='toy-text', version='1.0')\n"


@pytest.fixture
def archive(tmp_path):
    """A source archive whose setup.py leaves a trace, and the trace's path."""
    project = tmp_path / "toy_text-1.0"
    project.mkdir()
    marker = tmp_path / "ran"
    (project / "setup.py").write_text(SETUP.format(marker=str(marker)))
    (project / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: toy-text\nVersion: 1.0\n")
    (project / "text.txt").write_text("To be, or not to be")
    file = tmp_path / "toy_text-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        tar.add(project, arcname=project.name)
    return file, marker


def test_no_code_of_a_source_archive_runs(archive, tmp_path, monkeypatch):
    file, marker = archive
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    part = Part("toy-text==1.0", sha256)
    source = Source(file=file.name, size=file.stat().st_size, sha256=sha256, licence="none", parts=(part,))
    monkeypatch.setitem(fetch.SOURCES, "toy", source)
    monkeypatch.setattr(fetch.paths, "CACHE", tmp_path / "cache")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch.fetch("toy").read_bytes() == file.read_bytes()
    assert not marker.exists()

import pytest
from evaluation_toys import KINDS, mirrors

from cats.evaluation import tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Mirrors of a few documents."""
    return mirrors(tmp_path_factory.mktemp("mirrors"))


@pytest.fixture(scope="module")
def loaded_tasks(folder):
    return {name: tasks.load(name, data_dir=folder) for name in KINDS}

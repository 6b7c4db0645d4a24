"""Fixtures that several test files use: toy models, their text, and the embedded model."""

import os

# Threads that wait for each other by spinning take minutes for seconds of work where a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Each process of pytest-xdist, and what it starts, takes its share of the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

import pytest
import toys

from cats import corpora
from cats.calibration import calibrate as calibration
from cats.errors import CatsError
from cats.models import load as models

# Minutes each: begun first, side by side, so that no core is idle while one of them ends.
LONGEST = ("test_chapters_odd.py", "test_chapters_even.py")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture
def toy():
    """`toys.toy`, a factory of tiny models by family."""
    return toys.toy


@pytest.fixture
def llama():
    return toys.toy("llama")


@pytest.fixture
def batches():
    """Three batches of random tokens, a row of each padded."""
    return toys.batches()


@pytest.fixture(scope="session")
def smollm() -> models.LoadedModel:
    """The embedded model in float32, shared: leave it dense. Skipped where pip cannot fetch it."""
    try:
        return models.load()
    except CatsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def thresholds_file(smollm, tmp_path_factory):
    """A thresholds file of the embedded model, from 1,024 tokens."""
    corpus = corpora.load(split="train", documents=4)
    text = corpora.batches(corpus, smollm.tokenizer, tokens=1024, sequence_length=256, batch_size=2)
    thresholds = calibration.calibrate(smollm.model, text, source={"model": smollm.info, **text.info})
    file = tmp_path_factory.mktemp("calibrated") / "thresholds.json"
    thresholds.save(file)
    return file


@pytest.fixture
def themed():
    """The theme of the figures, without a window; what a test drew is closed behind it."""
    import matplotlib
    import matplotlib.pyplot as plt

    from cats.book import plots

    matplotlib.use("Agg")
    plots.theme()
    yield
    plt.close("all")

"""A model of four layers and some text for every test of rules."""

import pytest
import toys


@pytest.fixture
def model():
    return toys.toy("llama", num_hidden_layers=4)


@pytest.fixture
def text():
    return toys.batches(6)

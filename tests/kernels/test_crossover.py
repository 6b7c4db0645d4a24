"""Where the sparse kernels are used: by rows, hidden size and the share of neurons that some row keeps."""

import pytest
from cats_kernels import crossover


def test_the_crossover_follows_the_union():
    assert crossover.union_density(4, 0.9) == pytest.approx(1 - 0.9**4)
    assert crossover.sparse_pays(1, 0.5, 4096)
    assert crossover.sparse_pays(2, 0.9, 4096)
    assert not crossover.sparse_pays(16, 0.3, 4096), "sixteen independent rows need nearly every neuron"
    assert crossover.sparse_pays(16, 0.3, 4096, union=0.3), "unless they want the same ones"
    assert not crossover.sparse_pays(17, 0.99, 4096)


def test_one_row_of_a_small_layer_is_dense():
    assert not crossover.sparse_pays(1, 0.9, 512)
    assert not crossover.sparse_pays(1, 0.5, 768) and crossover.sparse_pays(1, 0.7, 768)
    assert all(crossover.sparse_pays(1, 0.01, d) for d in (896, 1536, 2304, 16384))


@pytest.mark.parametrize("hidden_size", (64, 512, 576, 1024, 1536, 2304, 4096, 8192, 16384))
def test_what_pays_at_one_sparsity_pays_at_every_higher_one(hidden_size):
    for rows in range(1, 18):
        pays = [crossover.sparse_pays(rows, s / 100, hidden_size) for s in range(100)]
        assert pays == sorted(pays)

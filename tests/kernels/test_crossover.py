"""When the sparse MLP pays for several tokens at once."""

import pytest
from cats_kernels import crossover


def test_the_crossover_follows_the_union():
    assert crossover.union_density(4, 0.9) == pytest.approx(1 - 0.9**4)
    assert crossover.sparse_pays(1, 0.5)
    assert crossover.sparse_pays(2, 0.9)
    assert not crossover.sparse_pays(16, 0.3), "sixteen independent rows need nearly every neuron"
    assert crossover.sparse_pays(16, 0.3, union=0.3), "unless they want the same ones"
    assert not crossover.sparse_pays(17, 0.99)
    for rows in range(2, 17):
        pays = [crossover.sparse_pays(rows, s / 100) for s in range(100)]
        assert pays == sorted(pays), "what pays at one sparsity pays at every higher one"

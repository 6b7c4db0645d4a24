"""Where a dense MLP with the mask applied is faster than the sparse one: read from measurements of both."""

import math

# Highest union density (share of neurons that some row keeps) at which the sparse op beats the best dense
# MLP: by the largest hidden size, then by the largest number of rows it holds for. Measured on an H200 in
# bfloat16 at hidden sizes 512, 576, 768, 896, 1536, 2304, 4096 and 8192; other devices go by the same table.
CROSSOVER = {
    512: {},
    832: {1: 0.31, 2: 0.47, 4: 0.6},
    1024: {1: 1.0, 2: 0.47, 4: 0.6},
    2048: {1: 1.0, 2: 0.82, 4: 0.86, 8: 0.28},
    4095: {1: 1.0, 2: 0.54, 4: 0.67, 8: 0.55},
    8191: {1: 1.0, 2: 0.95, 4: 0.89, 8: 0.75, 16: 0.59},
    math.inf: {1: 1.0, 2: 0.76, 4: 0.83, 8: 0.75, 16: 0.59},
}


def union_density(rows: int, sparsity: float) -> float:
    """Share of neurons that at least one of `rows` independent masks of this sparsity keeps, 1 - s^B."""
    return 1 - sparsity**rows


def sparse_pays(rows: int, sparsity: float, hidden_size: int, union: float | None = None) -> bool:
    """Whether `cats_mlp` of so many rows is faster on a GPU than a dense MLP with the mask applied.

    `sparsity`: share of gate activations each row drops, in [0, 1]; `union`: share of neurons that some row
    keeps, where it is known (rows of similar text, consecutive tokens); else that of independent masks.
    """
    density = union_density(rows, sparsity) if union is None else union
    by_rows = next(limits for largest, limits in CROSSOVER.items() if hidden_size <= largest)
    limits = [limit for largest, limit in by_rows.items() if rows <= largest]
    return bool(limits) and density <= limits[0]

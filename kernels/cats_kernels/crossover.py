"""Where a dense MLP with the mask applied is faster than the sparse one: read from measurements of both."""

# Highest union density (share of neurons that some row keeps) at which the sparse op beats the best dense
# MLP, by the largest number of rows it holds for: where the two lines cross on an H100 at 4096 x 11008.
CROSSOVER = {2: 1.0, 4: 0.97, 8: 0.93, 16: 0.73}


def union_density(rows: int, sparsity: float) -> float:
    """Share of neurons that at least one of `rows` independent masks of this sparsity keeps, 1 - s^B."""
    return 1 - sparsity**rows


def sparse_pays(rows: int, sparsity: float, union: float | None = None) -> bool:
    """Whether `cats_mlp` of so many rows is faster than a dense MLP with the mask applied.

    `sparsity`: share of gate activations each row drops, in [0, 1]; `union`: share of neurons that some row
    keeps, where it is known (rows of similar text, consecutive tokens); else that of independent masks.
    """
    density = union_density(rows, sparsity) if union is None else union
    limits = [limit for largest, limit in CROSSOVER.items() if rows <= largest]
    return bool(limits) and density <= limits[0]

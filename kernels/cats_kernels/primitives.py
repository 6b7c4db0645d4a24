"""Pieces that every CATS kernel is made of: activation, keep rule, and row tiles of a weight matrix."""

import triton
import triton.language as tl


@triton.jit
def activate(z, KIND: tl.constexpr):
    """act(z) in float32; NaN stays NaN (comparisons with NaN are false, hence ReLU's order)."""
    if KIND == "silu":
        return z / (1.0 + tl.exp(-z))
    elif KIND == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        return z / (1.0 + tl.exp(-2.0 * u))
    else:
        tl.static_assert(KIND == "relu", "unknown activation")
        return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def survives(z, threshold):
    """Keep where |z| >= threshold, compared in float32; NaN is kept, so that it is seen."""
    return (tl.abs(z) < threshold) == 0


@triton.jit
def keeps(z, rows, b, inside, threshold_ptr, mask_ptr, t_stride, mask_stride, MASKED: tl.constexpr):
    """Which of z [R, PAD] (neurons `rows`, batch rows b) count, each by its own activation or mask."""
    if MASKED:
        return inside & (
            tl.load(mask_ptr + b[None, :] * mask_stride + rows[:, None], mask=inside, other=0) != 0
        )
    t = tl.load(threshold_ptr + rows[:, None] * t_stride, mask=inside, other=0.0).to(tl.float32)
    return inside & survives(z, t)


@triton.jit
def load_rows(base, rows, wanted, cols, d: tl.constexpr, D: tl.constexpr, INSIDE: tl.constexpr = False):
    """Tile [R, D] of a row-major [m, d] matrix: `rows` [R] where `wanted` [R], columns past d read as zero.

    INSIDE says that no column is past d.

    Weights are read once, so they leave the L2 first and x, lists and partial sums stay in it.
    """
    pointers = base + rows.to(tl.int64)[:, None] * d + cols[None, :]
    if INSIDE or D == d:
        inside = wanted[:, None]
    else:
        inside = wanted[:, None] & (cols < d)[None, :]
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_chunks(base, rows, wanted, d: tl.constexpr, K: tl.constexpr):
    """Rows [R] of a row-major [m, d] matrix as a tuple of tiles [R, K], `load_rows` of K columns each."""
    tiles = ()
    for c in tl.static_range((d + K - 1) // K):
        tile = load_rows(base, rows, wanted, c * K + tl.arange(0, K), d, K, c * K + K <= d)
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def times_x(tiles, x_ptr, d: tl.constexpr, K: tl.constexpr):
    """[R] float32: rows that `load_chunks` read, times x [d]; columns are added up before lanes are.

    x is read again for each tile: it stays in the L1 cache, and registers are what limits programs.
    """
    total = tl.zeros([tiles[0].shape[0], K], dtype=tl.float32)
    for c in tl.static_range((d + K - 1) // K):
        cols = c * K + tl.arange(0, K)[None, :]  # two dimensions: x is read in the layout of the tile
        x = tl.load(x_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
        total += tiles[c].to(tl.float32) * x
    return tl.sum(total, axis=1)


@triton.jit
def add_rows(y, tiles, h):
    """y, a tuple of vectors [K], plus h [R] times rows that `load_chunks` read."""
    total = ()
    for c in tl.static_range(len(tiles)):
        part = y[c] + tl.sum(tiles[c].to(tl.float32) * h[:, None], axis=0)
        total = total + (part,)  # noqa: RUF005
    return total

"""Recorded times of one gated MLP at every width, on one GPU: where CATS gains, and where it does not."""

import pandas as pd

from cats.book.analysis import kernels
from cats.book.html_table import Table

SHAPES = (
    *("576x1536", "768x3072", "896x4864", "1536x8960", "2048x8192", "2304x9216", "3072x8192"),
    *("3584x18944", "4096x11008", "4096x14336", "5120x13824", "6144x16384", "8192x28672"),
)
# What the fastest dense MLP of a shape was made by, in a reader's words.
RECIPES = {
    "dense_eager": "PyTorch, op by op",
    "dense_fused": "PyTorch, gate and up in one product",
    "dense_max_autotune": "torch.compile, max-autotune",
    "dense_coordinate_descent": "torch.compile, coordinate descent",
    "dense_by_op": "the CATS op at threshold 0",
}


def read(begin: str = "nvidia-h200") -> kernels.Measured:
    """The records mlp_latency-<begin>-<shape> of SHAPES; CatsError where one is missing."""
    return kernels.read(begin, SHAPES)


def _by_level(measured: kernels.Measured, column: str) -> pd.DataFrame:
    """A column of CATS by shape (index) and gate sparsity (columns)."""
    cats = measured.cats.assign(above_us=lambda rows: kernels.above_bytes(rows))
    shown = cats[cats.sparsity.isin(kernels.LEVELS)]
    wide = shown.pivot(index="shape", columns="sparsity", values=column)
    return wide.loc[[kernels.title(shape) for shape in SHAPES]]


def table(measured: kernels.Measured) -> Table:
    """Dense and sparse times by width, in µs, and the gain over the fastest dense MLP."""
    best = measured.best.loc[[kernels.title(shape) for shape in SHAPES]]
    times, gains = _by_level(measured, "latency_us"), _by_level(measured, "speedup")
    above = _by_level(measured, "above_us")
    frame = pd.DataFrame({"hidden × intermediate size": best.index})
    frame["fastest dense, µs"] = best.latency_us.array
    frame["by"] = best.recipe.map(RECIPES).array
    for level in kernels.LEVELS:
        frame[f"CATS {level:.0%}, µs"] = times[level].array
        frame[f"× dense at {level:.0%}"] = gains[level].array
    frame["µs above the bytes at 50%"] = above[0.5].array
    formats = {name: "{:.1f}" for name in frame if name.endswith("µs") or name.startswith("µs")}
    formats |= {name: "{:.2f}" for name in frame if name.startswith("×")}
    caption = f"One gated MLP of random weights, one token, bfloat16, {measured.device}, by width"
    return Table(frame, formats, caption=caption)


def numbers(measured: kernels.Measured) -> dict:
    """What the page says of the widths, by the names under which it is glued."""
    gains, above = _by_level(measured, "speedup")[0.5], _by_level(measured, "above_us")[0.5]
    width = gains.index.str.split(" ").str[0].astype(int)
    return {
        "kernels_wide_device": measured.device,
        "kernels_wide_gain_low": gains[width >= 1536].min(),
        "kernels_wide_gain_high": gains[width >= 1536].max(),
        "kernels_wide_small_low": gains[width < 896].min(),
        "kernels_wide_small_high": gains[width < 896].max(),
        "kernels_wide_above_low": above[width < 8192].min(),
        "kernels_wide_above_high": above[width < 8192].max(),
    }

"""What the records say about speed, for each claim of the paper that other hardware can test."""

from collections.abc import Callable, Iterable
from functools import partial

import pandas as pd

from cats.book.analysis import recorded
from cats.book.analysis.claims_quality import LEVELS
from cats.book.analysis.findings import Finding, at_least

_SHAPES = ("h100-4096x11008", "h100-4096x14336", "h100-5120x13824", "h100-8192x28672")
_DECODED = ("h100-llama-2-7b", "h100-mistral-7b")


def faster() -> Iterable[Finding]:
    """The fused kernel over the fastest dense MLP at each sparsity."""
    for name, rows in _mlps():
        gains = _gains(rows, "cats")
        yield Finding(name, _at(gains), bool((gains > 1).all()))


def monotone() -> Iterable[Finding]:
    """The time of the fused kernel falls from each sparsity to the next."""
    for name, rows in _mlps():
        times = rows[(rows.variant == "cats") & (rows.launch == "graph")].set_index("sparsity").latency_us
        words = ", ".join(f"{value:.0f} µs at {level:.0%}" for level, value in times.sort_index().items())
        yield Finding(name, words, bool((times.sort_index().diff().dropna() < 0).all()))


def near_bound(least: float) -> Iterable[Finding]:
    """Share of the time that reading the weights takes at the bandwidth of a read-only kernel, at 50 %."""
    for name, rows in _mlps():
        share = rows[(rows.variant == "cats") & (rows.launch == "graph") & (rows.sparsity == 0.5)].bound_share
        yield Finding(name, f"{share.iloc[0]:.0%} of the bandwidth", bool(share.iloc[0] >= least))


def beats_gather() -> Iterable[Finding]:
    """The fused kernel against gathering the surviving neurons, both launched from Python."""
    for name, rows in _mlps():
        rows = rows[rows.launch == "eager"]
        ratio = _gains(rows, "cats", "eager") / _gains(rows, "cats_gather", "eager")
        yield Finding(name, f"faster {_at(ratio)}", bool((ratio > 1).all()))


def bytes_decide() -> Iterable[Finding]:
    """At 50 %: masking with every weight read, and the fused kernel, over the fastest dense MLP."""
    for name, rows in _mlps():
        masked, fused = (_gains(rows, variant)[0.5] for variant in ("cats_mask_dense", "cats"))
        yield Finding(name, f"masking {masked:.2f} ×, the kernel {fused:.2f} ×", masked <= 1 < fused)


def decodes_faster(least: float) -> Iterable[Finding]:
    """Time that a token takes less at 50 % than with the fastest dense decoding, at every length."""
    for name, rows in _decoded():
        saved = 1 - 1 / rows.set_index("new_tokens").speedup_over_best_dense.sort_index()
        words = ", ".join(f"{value:.0%} less for {tokens:,} tokens" for tokens, value in saved.items())
        yield Finding(name, words, bool((saved >= least).all()))


def steady(most: float) -> Iterable[Finding]:
    """Largest over smallest speed-up at 50 % over the lengths measured."""
    for name, rows in _decoded():
        gains = rows.speedup_over_best_dense
        words = f"{gains.min():.2f} to {gains.max():.2f} × over {rows.new_tokens.min()} to "
        yield Finding(
            name, f"{words}{rows.new_tokens.max():,} tokens", bool(gains.max() / gains.min() <= most)
        )


def batches(least: float) -> Iterable[Finding]:
    """The kernel for a few rows at 50 %, masks of the rows independent, over the fastest dense MLP."""
    rows = recorded.rows("mlp_latency", ["h100-batch"])
    rows = rows[(rows.variant == "cats") & (rows.launch == "graph") & (rows.sparsity == 0.5)]
    for batch in (2, 4):
        gains = rows[rows.batch == batch].speedup_over_best_dense
        words = f"{gains.min():.2f} to {gains.max():.2f} × from independent to related sequences"
        yield Finding(f"batch size {batch}", words, at_least(gains.min(), gains.max(), least))


def _mlps() -> Iterable[tuple[str, pd.DataFrame]]:
    for slug in _SHAPES:
        rows = recorded.rows("mlp_latency", [slug])
        if len(rows):
            yield f"{slug.partition('-')[2]} on an H100, bf16, random weights", rows


def _decoded() -> Iterable[tuple[str, pd.DataFrame]]:
    """Rows of the captured loop at 50 %, one for each length."""
    for slug in _DECODED:
        rows = recorded.rows("decode", [slug])
        if len(rows):
            name = f"{rows.geometry.iloc[0]} on an H100, bf16, {rows.weights.iloc[0]} weights"
            yield name, rows[(rows.variant == "cats_loop") & (rows.sparsity == 0.5)]


def _gains(rows: pd.DataFrame, variant: str, launch: str = "graph") -> pd.Series:
    found = rows[(rows.variant == variant) & (rows.launch == launch) & rows.sparsity.isin(LEVELS)]
    return found.set_index("sparsity").speedup_over_best_dense.sort_index()


def _at(gains: pd.Series) -> str:
    return ", ".join(f"{value:.2f} × at {level:.0%}" for level, value in gains.items())


TESTS: dict[str, Callable[[], Iterable[Finding]]] = {
    "mlp-faster": faster,
    "mlp-monotone": monotone,
    "mlp-near-optimal": partial(near_bound, 0.85),
    "fused-beats-gather": beats_gather,
    "bytes-not-masks": bytes_decide,
    "decode-faster": partial(decodes_faster, 0.13),
    "decode-steady": partial(steady, 1.05),
    "batches": partial(batches, 1.02),
}

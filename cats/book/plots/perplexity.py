"""Figures of the chapter on perplexity (the paper's rebuttal)."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cats.book import plots


def against_sparsity(rows: pd.DataFrame) -> Figure:
    """Loss over sparsity on one axis, nats on the left and perplexity on the right, with paired intervals.

    `rows`: gate_sparsity, nll_nats, delta_low, delta_high (of the paired difference to dense), the dense
    row first.
    """
    figure, axes = plots.figure(3.6)
    dense = rows.nll_nats.iloc[0]
    s, nll = rows.gate_sparsity.to_numpy(), rows.nll_nats.to_numpy()
    # dense has no interval, nor have others where documents are few
    low = (dense + rows.delta_low.astype(float)).fillna(rows.nll_nats).to_numpy()
    high = (dense + rows.delta_high.astype(float)).fillna(rows.nll_nats).to_numpy()
    axes.axhline(dense, color=plots.GREY, linestyle="--", linewidth=1.2)
    axes.annotate(
        "dense",
        (1, dense),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 4),
        textcoords="offset points",
        color=plots.GREY,
        ha="right",
    )
    axes.errorbar(s, nll, yerr=[nll - low, high - nll], color=plots.BLUE, marker="o", capsize=4)
    for x, y in zip(s, nll, strict=True):
        axes.annotate(
            f"{y:.2f}", (x, y), xytext=(0, 9), textcoords="offset points", ha="center", color=plots.BLUE
        )
    axes.margins(x=0.1, y=0.16)
    axes.set(xlabel="gate sparsity", ylabel="loss, nats a token")
    axes.set_xticks(s, [f"{value:.0%}" for value in s])
    right = axes.secondary_yaxis("right", functions=(np.exp, lambda p: np.log(np.maximum(p, 1e-9))))
    right.set_ylabel("perplexity, exp(loss)")
    low_tick, high_tick = (np.exp(edge) for edge in axes.get_ylim())
    right.set_yticks(_round_ticks(low_tick, high_tick))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(plt.NullLocator())
    right.spines["right"].set_visible(True)
    return figure


def by_document(deltas: pd.DataFrame, intervals: pd.DataFrame) -> Figure:
    """Each document's rise of the loss over dense, and the mean with its interval, for each sparsity.

    `deltas`: gate_sparsity, document, tokens, delta_nll (a token); `intervals`: gate_sparsity, delta_nll,
    delta_low, delta_high.
    """
    figure, axes = plots.figure(3.4)
    generator = np.random.default_rng(0)
    for place, row in enumerate(intervals.itertuples()):
        points = deltas[deltas.gate_sparsity == row.gate_sparsity]
        x = place - 0.14 + 0.2 * (generator.random(len(points)) - 0.5)
        size = 8 + 70 * points.tokens / deltas.tokens.max()
        axes.scatter(x, points.delta_nll, s=size, color=plots.SKY, alpha=0.75, linewidths=0)
        spread = [[row.delta_nll - row.delta_low], [row.delta_high - row.delta_nll]]
        axes.errorbar(place + 0.2, row.delta_nll, yerr=spread, color=plots.VERMILION, marker="s", capsize=4)
    axes.axhline(0, color=plots.BLACK, linewidth=1)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xticks(range(len(intervals)), [f"{s:.0%}" for s in intervals.gate_sparsity])
    axes.set_xlim(-0.6, len(intervals) - 0.4)
    axes.yaxis.set_major_formatter("{x:g}")
    lowest = min(0.0, deltas.delta_nll.min(), intervals.delta_low.min())
    axes.set_ylim(bottom=1.5 * lowest - 0.01)
    axes.set(xlabel="gate sparsity", ylabel="loss − dense, nats a token")
    axes.set_title("● one document", loc="left", color=plots.BLUE)
    axes.set_title("■ mean, 95 % interval", loc="right", color=plots.VERMILION)
    return figure


def _round_ticks(low: float, high: float) -> list[float]:
    """At most six numbers 1, 2 or 5 (or only 1) times a power of ten between two perplexities."""
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        steps = [factor * 10.0**power for power in range(-1, 10) for factor in factors]
        ticks = [step for step in steps if low <= step <= high]
        if len(ticks) <= 6:
            break
    return ticks or [low, high]

"""Figures of the chapter on calibration (paper sec. 4.1)."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from cats.book import plots
from cats.core.thresholds import Thresholds


def by_layer(thresholds: Thresholds, sparsities: Sequence[float]) -> Figure:
    """Thresholds by layer, a line for each sparsity, on a log scale."""
    figure, axes = plots.figure(3.6)
    axes.set_yscale("log")
    ends = []
    for index, s in enumerate(sparsities):
        look = plots.style(index)
        values = thresholds.at(s)
        axes.plot(np.arange(len(values)), values, markersize=3, **look)
        ends.append((len(values) - 1, float(values[-1]), f"s = {s:.0%}", look["color"]))
    axes.set(xlabel="layer", ylabel="threshold t (log scale)")
    plots.label_lines(axes, ends)
    return figure


def target_and_realised(by_layer: Mapping[float, Tensor], per_token: Mapping[float, Tensor]) -> Figure:
    """Realised sparsity on held-out text for each target: by layer [L], and its spread over tokens [L, N]."""
    figure, (left, right) = plt.subplots(2, 1, figsize=(plots.WIDTH, 5.4))
    ends = []
    for index, (target, realised) in enumerate(by_layer.items()):
        look = plots.style(index)
        points = 100 * (realised.numpy() - target)
        left.plot(np.arange(len(points)), points, markersize=3, **look)
        ends.append((len(points) - 1, float(points[-1]), f"s = {target:.0%}", look["color"]))
    left.axhline(0, color=plots.BLACK, linewidth=1)
    left.set(xlabel="layer", ylabel="realised − target,\npercentage points")
    plots.label_lines(left, ends, gap=0.11)
    targets = list(per_token)
    parts = right.violinplot(
        [per_token[s].mean(0).numpy() for s in targets],
        positions=range(len(targets)),
        widths=0.8,
        showextrema=False,
    )
    for index, body in enumerate(parts["bodies"]):
        body.set(facecolor=plots.CYCLE[index], alpha=0.45, linewidth=0)
    for index, s in enumerate(targets):
        low, middle, high = np.quantile(per_token[s].mean(0).numpy(), [0.05, 0.5, 0.95])
        right.plot([index, index], [low, high], color=plots.CYCLE[index], linewidth=4, solid_capstyle="butt")
        right.plot(index, middle, "o", color="white", markeredgecolor=plots.BLACK, markersize=5)
        right.plot([index - 0.42, index + 0.42], [s, s], color=plots.BLACK, linewidth=1)
    right.set_xticks(range(len(targets)), [f"{s:.0%}" for s in targets])
    right.set(xlabel="target sparsity", ylabel="realised, each token\n(mean over layers)")
    right.margins(y=0.08)
    plots.percent(right.yaxis)
    return figure


def samples(errors: pd.DataFrame, sparsities: Sequence[float]) -> Figure:
    """Error of the realised sparsity for each number of rows; columns sparsity, rows, draw, layer, error."""
    figure, axes = plt.subplots(
        len(sparsities), 1, figsize=(plots.WIDTH, 1.9 * len(sparsities) + 0.3), sharex=True
    )
    sizes = sorted(errors.rows.unique())
    for s, panel in zip(sparsities, np.atleast_1d(axes), strict=True):
        chosen = errors[errors.sparsity == s]
        for place, size in enumerate(sizes):
            draws = sorted(chosen[chosen.rows == size].draw.unique())
            for draw in draws:
                points = 100 * chosen[(chosen.rows == size) & (chosen.draw == draw)].error.to_numpy()
                x = place + 0.24 * (draw - np.mean(draws))
                panel.plot(
                    [x] * len(points), points, "o", color=plots.CYCLE[place], markersize=3.2, alpha=0.55
                )
        panel.axhline(0, color=plots.BLACK, linewidth=1)
        panel.set(ylabel=f"s = {s:.0%}")
        panel.set_xticks(range(len(sizes)), [f"{size} rows" for size in sizes])
        panel.set_xlim(-0.6, len(sizes) - 0.4)
    figure.supylabel("realised − target, percentage points", fontsize=11)
    return figure


def exact_and_reference(achieved: Mapping[float, tuple[Tensor, Tensor]]) -> Figure:
    """Achieved minus target sparsity on the calibration text, by layer: exact quantile, reference code."""
    figure, axes = plt.subplots(
        len(achieved), 1, figsize=(plots.WIDTH, 1.75 * len(achieved) + 0.3), sharex=True
    )
    for (s, (exact, reference)), panel in zip(achieved.items(), np.atleast_1d(axes), strict=True):
        layers = np.arange(len(exact))
        reference_points, exact_points = (100 * (values.numpy() - s) for values in (reference, exact))
        panel.bar(layers, reference_points, color=plots.VERMILION, width=0.7)
        panel.plot(layers, exact_points, "o", color=plots.BLUE, markersize=3.2)
        panel.set(ylabel=f"s = {s:.0%}")
        panel.margins(y=0.15)
    first = np.atleast_1d(axes)[0]
    first.set_title("● exact quantile", loc="left", color=plots.BLUE)
    first.set_title("■ reference code's bins", loc="right", color=plots.VERMILION)
    np.atleast_1d(axes)[-1].set_xlabel("layer")
    figure.supylabel("achieved − target, percentage points", fontsize=11)
    return figure


def shift_by_layer(shifts: Mapping[str, Tensor], ylabel: str) -> Figure:
    """Differences of sparsity (fractions) by layer, in percentage points, a line for each name."""
    figure, axes = plots.figure(3.0)
    ends = []
    for index, (name, values) in enumerate(shifts.items()):
        look = plots.style(index)
        axes.plot(np.arange(len(values)), 100 * values.numpy(), markersize=3, **look)
        ends.append((len(values) - 1, 100 * float(values[-1]), name, look["color"]))
    axes.axhline(0, color=plots.BLACK, linewidth=1)
    axes.set(xlabel="layer", ylabel=ylabel)
    plots.label_lines(axes, ends)
    return figure

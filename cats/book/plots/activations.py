"""Figures of the chapter on activations (paper Fig. 1)."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from cats.book import plots
from cats.book.analysis.activations import Distribution

NEGATIVE, POSITIVE = plots.SKY, plots.BLUE


def all_layers(distribution: Distribution, sparsity: float, *, columns: int = 4) -> Figure:
    """Density of z in every layer, one panel each, shared axes; the band that `sparsity` drops is shaded."""
    layers = len(distribution.magnitudes)
    rows = -(-layers // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(plots.WIDTH, 0.78 * rows + 0.5), sharex=True, sharey=True, squeeze=False
    )
    thresholds = distribution.thresholds(sparsity)
    for layer, panel in enumerate(axes.flat):
        if layer >= layers:
            panel.set_visible(False)
            continue
        centres, density = distribution.density(layer, merge=13)
        panel.axvspan(-thresholds[layer], thresholds[layer], color=plots.ORANGE, alpha=0.35, linewidth=0)
        shown = centres.abs() < 0.75  # what lies outside the axes would still be in the file
        panel.fill_between(centres[shown], density[shown], step="mid", color=plots.BLUE, linewidth=0)
        panel.text(0.97, 0.88, str(layer), transform=panel.transAxes, ha="right", va="top")
        panel.grid(False)
    axes[0, 0].set(xlim=(-0.7, 0.7), ylim=(0.05, 30), yscale="log", xticks=[-0.5, 0, 0.5])
    axes[0, 0].set_xticklabels(["−.5", "0", ".5"])
    figure.supxlabel("z = act(x W_gate)", fontsize=11)
    figure.supylabel("density (log scale)", fontsize=11)
    return figure


def selected_layers(distribution: Distribution, layers: Sequence[int], sparsities: Sequence[float]) -> Figure:
    """Density of |z| in a few layers, the negative and the positive z stacked, with threshold lines.

    What the axes cut off is written beside them: the height of a peak, and thresholds above |z| = 1.
    """
    figure, axes = plt.subplots(len(layers), 1, figsize=(plots.WIDTH, 2.0 * len(layers) + 0.3), sharex=True)
    thresholds = {s: distribution.thresholds(s) for s in sparsities}
    for layer, panel in zip(layers, np.atleast_1d(axes), strict=True):
        centres, density = (values.numpy() for values in distribution.density(layer))
        centre = len(centres) // 2
        positive, negative = density[centre:].copy(), density[: centre + 1][::-1].copy()
        positive[0] /= 2  # the bin at zero holds both signs
        negative[0] /= 2
        x = centres[centre:]
        panel.fill_between(x, negative, step="mid", color=NEGATIVE, linewidth=0)
        panel.fill_between(x, negative, negative + positive, step="mid", color=POSITIVE, linewidth=0)
        height = (negative + positive).max()
        top = 1.12 * np.sort(negative + positive)[-3]
        beyond = [f"{s:.0%} at |z| = {t[layer]:.2f}" for s, t in thresholds.items() if t[layer] > 1]
        cut = [f"peak {height:.0f}"] if height > top else []
        if notes := [*cut, *beyond]:
            text = f"off the axes: {', '.join(notes)}"
            panel.text(
                0.99,
                0.9,
                text,
                transform=panel.transAxes,
                ha="right",
                va="top",
            )
        for index, (s, t) in enumerate(thresholds.items()):
            here = float(t[layer])
            if here <= 1:
                panel.axvline(here, color=plots.VERMILION, linestyle=plots.DASHES[index], linewidth=1.6)
                panel.annotate(
                    f"{s:.0%}",
                    (here, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, 2 + 11 * (index % 2)),
                    textcoords="offset points",
                    color=plots.VERMILION,
                    ha="center",
                    va="bottom",
                    annotation_clip=False,
                )
        panel.set(xlim=(0, 1), ylim=(0, top))
        panel.set_title(f"layer {layer}", loc="right")
        panel.grid(False)
    first = np.atleast_1d(axes)[0]
    first.text(0.62, 0.62, "z < 0", color=plots.BLACK, transform=first.transAxes, backgroundcolor=NEGATIVE)
    first.text(0.78, 0.62, "z > 0", color="white", transform=first.transAxes, backgroundcolor=POSITIVE)
    figure.supylabel("density", fontsize=11)
    np.atleast_1d(axes)[-1].set_xlabel("|z|")
    return figure


def concentration(distribution: Distribution, sparsities: Sequence[float], near: float) -> Figure:
    """By depth: the share of activations near zero, and the share of Σz² that each sparsity drops."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(plots.WIDTH, 4.6), sharex=True)
    layers = np.arange(len(distribution.magnitudes))
    negative, small = distribution.negative_share(), distribution.share_below(near)
    above.plot(layers, negative, color=plots.PURPLE, linestyle="--", marker="s", markersize=3)
    above.plot(layers, small, color=plots.BLUE, marker="o", markersize=3)
    ends = [(layers[-1], float(negative[-1]), "z < 0", plots.PURPLE)]
    ends.append((layers[-1], float(small[-1]), f"|z| < {near:g}", plots.BLUE))
    above.set(ylim=(0, 1), ylabel="share of\nactivations")
    plots.label_lines(above, ends)
    dropped = []
    for index, s in enumerate(sparsities):
        look = plots.style(index)
        energy = distribution.energy_below(distribution.thresholds(s))
        below.plot(layers, energy, markersize=3, **look)
        dropped.append((layers[-1], float(energy[-1]), f"s = {s:.0%}", look["color"]))
    below.set(ylim=(0, None), xlabel="layer", ylabel="share of Σz²\ndropped")
    plots.label_lines(below, dropped, gap=0.11)
    for panel in (above, below):
        plots.percent(panel.yaxis)
    return figure


def thresholds_by_depth(
    lines: Mapping[str, Distribution], sparsities: Sequence[float], *, ylim: tuple[float, float] | None = None
) -> Figure:
    """Thresholds by layer, a panel for each sparsity, a line for each model or text."""
    figure, axes = plt.subplots(
        len(sparsities), 1, figsize=(plots.WIDTH, 1.75 * len(sparsities) + 0.3), sharex=True
    )
    for s, panel in zip(sparsities, np.atleast_1d(axes), strict=True):
        ends = []
        for index, (name, distribution) in enumerate(lines.items()):
            look = plots.style(index)
            values = distribution.thresholds(s)
            panel.plot(np.arange(len(values)), values, markersize=3, **look)
            ends.append((len(values) - 1, float(values[-1]), name, look["color"]))
        panel.set(ylabel=f"t at s = {s:.0%}", ylim=ylim or (0, None))
        plots.label_lines(panel, ends, gap=0.16)
    np.atleast_1d(axes)[-1].set_xlabel("layer")
    return figure


def first_tokens(distribution: Distribution, first: str, rest: str) -> Figure:
    """The largest and the median |z| by layer, of first tokens and of all others."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(plots.WIDTH, 4.6), sharex=True)
    looks = {first: (plots.VERMILION, "-", "o"), rest: (plots.BLUE, "--", "s")}
    panels: tuple[tuple, ...] = (
        (above, distribution.largest),
        (below, lambda g: distribution.thresholds(0.5, g)),
    )
    for panel, quantity in panels:
        ends = []
        for group, (colour, dash, marker) in looks.items():
            values: Tensor = quantity(group)
            panel.plot(
                np.arange(len(values)), values, color=colour, linestyle=dash, marker=marker, markersize=3
            )
            ends.append((len(values) - 1, float(values[-1]), group, colour))
        if panel is above:
            panel.set_yscale("log")
        else:
            panel.set_ylim(0, None)
        plots.label_lines(panel, ends, gap=0.12)
    above.set_ylabel("largest |z|\n(log scale)")
    below.set(xlabel="layer", ylabel="median |z|")
    return figure

"""One seaborn theme and its conventions; a module for each chapter, a function for each figure."""

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common colour vision; grey is for what is compared against.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK, GREY, LIGHT = "#222222", "#777777", "#CCCCCC"
CYCLE = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P"]

WIDTH = 5.6  # inches; at 360 CSS pixels the 11 pt text is still 10 pixels high


def theme() -> None:
    """Set the house style for every figure that follows."""
    sns.set_theme(context="paper", style="ticks", palette=CYCLE)
    mpl.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.4),
            "figure.dpi": 96,
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "axes.labelsize": 11,
            "axes.titlesize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.labelcolor": BLACK,
            "text.color": BLACK,
            "xtick.color": BLACK,
            "ytick.color": BLACK,
            "lines.linewidth": 1.8,
            "figure.constrained_layout.use": True,
            "svg.hashsalt": "cats",
            "axes.grid": True,
            "grid.color": "#E8E8E8",
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
        }
    )


def style(index: int) -> dict:
    """Colour, dash and marker of the index-th line: told apart without colour too."""
    return {
        "color": CYCLE[index % len(CYCLE)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def shade(part: float) -> tuple[float, ...]:
    """A blue for a place in [0, 1] of many ordered lines, such as layers: the first light, the last dark."""
    return mpl.colormaps["Blues"](0.3 + 0.65 * part)


def label_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]], *, gap: float = 0.075) -> None:
    """Write (x, y, text, colour) beside the end of each line, pushed apart by `gap` of the axes' height."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    to_axes = axes.transData + axes.transAxes.inverted()
    placed: list[float] = []
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        height = to_axes.transform((x, min(max(y, low), high)))[1]
        if placed:
            height = max(height, placed[-1] + gap)
        placed.append(height)
        axes.annotate(
            text,
            xy=(to_axes.transform((x, y if not log or y > 0 else low))[0], height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def percent(axis, decimals: int | None = None) -> None:
    """Ticks of a share as per cent, with as many decimals as their range takes unless `decimals` says."""
    axis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=decimals))


def figure(height: float = 3.4, **options) -> tuple[Figure, Axes]:
    """A figure of the book's width, `height` in inches; options of `plt.subplots`."""
    return plt.subplots(figsize=(WIDTH, height), **options)


def offsets(count: int, spread: float) -> np.ndarray:
    """Places of `count` marks beside each other, from -spread to spread around 0; one is at 0."""
    return np.linspace(-spread, spread, count) if count > 1 else np.zeros(count)


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above the figure for all `panels`, each label once."""
    known = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=2, frameon=False)

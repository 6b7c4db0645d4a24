"""Figures of the chapter on disputed numbers: what each choice moves, and what explains the spread."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from cats.book import plots
from cats.book.analysis.anova import Analysis

_LABELLED = 0.08  # the narrowest part of a bar that has room for its number


def effects(analysis: Analysis, unit: str) -> Figure:
    """Mean result of each level of each choice (point), and the range of all settings that have it (bar)."""
    rows = [
        (factor, row) for factor in analysis.factors for row in analysis.means(factor).itertuples(index=False)
    ]
    names = list(dict.fromkeys(factor for factor, _ in rows))
    figure, axes = plots.figure(1.3 + 0.32 * (len(rows) + len(names)))
    place, ticks, labels = 0.0, [], []
    for number, factor in enumerate(names):
        colour = plots.CYCLE[number % len(plots.CYCLE)]
        axes.text(
            0.012,
            place,
            factor,
            transform=axes.get_yaxis_transform(),
            color=colour,
            fontweight="bold",
            va="center",
        )
        place += 1
        for _, row in [item for item in rows if item[0] == factor]:
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=5, alpha=0.25)
            axes.plot(row.mean, place, color=colour, marker="o", markersize=7, linestyle="none")
            ticks.append(place)
            labels.append(row.level)
            place += 1
    axes.axvline(analysis.mean, color=plots.GREY, linewidth=1.2)
    axes.set_yticks(ticks, labels)
    axes.set_ylim(place - 0.4, -0.7)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)
    return figure


def shares(analyses: Mapping[str, Analysis]) -> Figure:
    """Share of the variation by each choice, by pairs of choices and by more of them, a bar a sweep."""
    factors = list(dict.fromkeys(factor for each in analyses.values() for factor in each.factors))
    tables = [each.table for each in analyses.values()]
    parts = {name: [table.share[table.effect == name].sum() for table in tables] for name in factors}
    parts["pairs of choices"] = [table.share[table.order == 2].sum() for table in tables]
    parts["more"] = [table.share[table.order > 2].sum() for table in tables]
    colours = [*plots.CYCLE[: len(factors)], plots.GREY, plots.LIGHT]
    figure, axes = plots.figure(1.6 + 0.5 * len(analyses))
    places = np.arange(len(analyses))
    left = np.zeros(len(analyses))
    for (name, widths), colour in zip(parts.items(), colours, strict=True):
        axes.barh(places, widths, left=left, color=colour, label=name, edgecolor="white", linewidth=0.8)
        for y, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= _LABELLED:
                axes.annotate(
                    f"{width:.0%}", (start + width / 2, y), color=plots.BLACK if name == "more" else "white",
                    ha="center", va="center", fontsize=10,
                )  # fmt: skip
        left += widths
    axes.set_yticks(places, [name.replace(", ", ",\n", 1) for name in analyses])
    axes.set_ylim(len(analyses) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    plots.percent(axes.xaxis)
    axes.set_xlabel("share of the variation")
    plots.legend(figure, [axes])
    return figure

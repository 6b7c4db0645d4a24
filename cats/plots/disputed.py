"""Figures of the chapter on disputed numbers: what each choice moves, and what explains the spread."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cats import plots
from cats.variance import Analysis

_OTHERS = "everything else"


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


def shares(tables: Mapping[str, pd.DataFrame], most: int = 6) -> Figure:
    """Share of the variation by each effect, largest first, a panel for each analysis.

    `tables`: title -> the table of a `cats.variance.Analysis`. What is beyond the first `most` is one bar.
    """
    counts = [min(len(table), most + 1) for table in tables.values()]
    figure, panels = plots.figure(
        1.1 + sum(0.6 + 0.34 * count for count in counts),
        nrows=len(tables),
        squeeze=False,
        gridspec_kw={"height_ratios": counts},
    )
    for axes, (title, table) in zip(panels[:, 0], tables.items(), strict=True):
        shown = table.head(most)[["effect", "order", "share"]]
        rest = 1 - shown.share.sum()
        if len(table) > most:
            shown = pd.concat([shown, pd.DataFrame([{"effect": _OTHERS, "order": 9, "share": rest}])])
        colours = [{1: plots.BLUE, 2: plots.ORANGE}.get(order, plots.LIGHT) for order in shown.order]
        places = np.arange(len(shown))
        axes.barh(places, shown.share, color=colours)
        for y, share in zip(places, shown.share, strict=True):
            axes.annotate(
                f"{share:.1%}", (share, y), (4, 0), textcoords="offset points", va="center", fontsize=10
            )
        axes.set_yticks(places, [effect.replace(" × ", " ×\n", 1) for effect in shown.effect])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1.12)
        axes.grid(axis="y", visible=False)
        axes.set_title(title, loc="left")
        plots.percent(axes.xaxis)
    panels[-1, 0].set_xlabel("share of the variation")
    for colour, name in ((plots.BLUE, "one choice"), (plots.ORANGE, "two choices together")):
        panels[0, 0].barh([0], [0], color=colour, label=name)
    plots.legend(figure, [panels[0, 0]])
    return figure

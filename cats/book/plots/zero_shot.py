"""Figures of the chapters on tasks: paired differences as a forest, and what is kept over sparsity."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cats.book import plots


def forest(rows: pd.DataFrame) -> Figure:
    """Paired difference to dense of each task (down) for each method and sparsity (colour), with intervals.

    `rows`: task, label, delta_acc, delta_low, delta_high; rows without a difference are left out.
    """
    rows = rows[rows.delta_acc.notna()]
    tasks, labels = list(dict.fromkeys(rows.task)), list(dict.fromkeys(rows.label))
    figure, axes = plots.figure(1.5 + 0.15 * len(tasks) * max(len(labels), 3))
    offsets = plots.offsets(len(labels), 0.3)
    for number, name in enumerate(labels):
        part = rows[rows.label == name]
        places = [tasks.index(task) + offsets[number] for task in part.task]
        values = part.delta_acc.to_numpy(dtype=float)
        below = values - part.delta_low.to_numpy(dtype=float)
        above = part.delta_high.to_numpy(dtype=float) - values
        axes.errorbar(
            values,
            places,
            xerr=[np.maximum(below, 0), np.maximum(above, 0)],
            **{**plots.style(number), "linestyle": "none"},
            capsize=3,
            markersize=5,
            label=name,
        )
    axes.axvline(0, color=plots.GREY, linewidth=1.2)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("accuracy − dense, same documents")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def kept(rows: pd.DataFrame) -> Figure:
    """Share of the dense model's mean accuracy, over gate sparsity (left) and model-level sparsity (right).

    `rows`: series, gate_sparsity, model_sparsity, share, low, high (interval, may be missing), reported
    (True for values of the paper, which come first and are drawn grey and hollow).
    """
    figure, panels = plots.figure(4.2, ncols=2, sharey=True)
    papers = 0
    for number, (series, part) in enumerate(rows.groupby("series", sort=False)):
        reported = bool(part.reported.iloc[0])
        papers += reported
        look = plots.style(number - (0 if reported else papers))
        look |= {"color": plots.GREY, "linestyle": "none"} if reported else {}
        if reported:
            look |= {"markerfacecolor": "white", "markersize": 8, "markeredgewidth": 1.5}
        for axes, column in zip(panels, ("gate_sparsity", "model_sparsity"), strict=True):
            part = part.sort_values(column)
            if reported:
                axes.plot(part[column], part.share, **look, label=series)
                continue
            spread = [(part.share - part.low).fillna(0), (part.high - part.share).fillna(0)]
            axes.errorbar(part[column], part.share, yerr=spread, **look, capsize=3, label=series)
    for axes, name in zip(panels, ("gate sparsity", "model-level sparsity"), strict=True):
        axes.margins(0.12)
        axes.axhline(1, color=plots.GREY, linewidth=1.2)
        axes.set_xlim(left=0)
        axes.set_xlabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    narrow = np.ptp(rows.share) < 0.06
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1 if narrow else 0))
    panels[0].set_ylabel("share of the dense average")
    plots.legend(figure, [panels[0]])
    return figure


def losses(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Rise of the loss over dense for each rule (down) and sparsity (colour), a panel for each measurement.

    `frames`: title of the panel -> rows with rule, gate_sparsity, delta_nll, delta_low, delta_high.
    """
    rules = list(dict.fromkeys(rule for rows in frames.values() for rule in rows.rule))
    levels = sorted({level for rows in frames.values() for level in rows.gate_sparsity})
    offsets = plots.offsets(len(levels), 0.2)
    figure, panels = plots.figure(1.7 + 0.34 * len(rules), ncols=len(frames), sharey=True, squeeze=False)
    for axes, (title, rows) in zip(panels[0], frames.items(), strict=True):
        for number, level in enumerate(levels):
            part = rows[rows.gate_sparsity == level]
            places = [rules.index(rule) + offsets[number] for rule in part.rule]
            spread = [(part.delta_nll - part.delta_low).clip(0), (part.delta_high - part.delta_nll).clip(0)]
            look = plots.style(number) | {"linestyle": "none"}
            axes.errorbar(
                part.delta_nll, places, xerr=spread, **look, capsize=3, label=f"{level:.0%} gate sparsity"
            )
        axes.axvline(0, color=plots.GREY, linewidth=1.2)
        axes.set_title(title, loc="left", fontsize=11 if len(frames) < 3 else 9)  # names of models are long
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.grid(axis="y", visible=False)
    panels[0, len(frames) // 2].set_xlabel("loss − dense, nats")
    panels[0, 0].set_yticks(range(len(rules)), rules)
    panels[0, 0].set_ylim(len(rules) - 0.5, -0.5)
    plots.legend(figure, [panels[0, 0]])
    return figure

"""Figures of the chapter on measures of sparsity: frequencies, neurons never used, and chunks."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cats.book import plots
from cats.book.analysis.anatomy import Anatomy

_COUNTS = {"never_active": "never active", "often_active": "active for most tokens"}
_PLACES = np.linspace(0, 1, 201)  # points of a curve: enough for the eye, and a small file


def frequencies(found: Mapping[str, Anatomy]) -> Figure:
    """Neurons of each layer by how often they are active, busiest first: a panel for each model.

    A line a layer, from the first (light) to the last (dark); dashed, what all would have if they were alike.
    """
    figure, panels = plots.figure(3.6, ncols=len(found), sharey=True, squeeze=False)
    for axes, (title, anatomy) in zip(panels[0], found.items(), strict=True):
        layers = len(anatomy.frequency)
        for layer, frequency in enumerate(anatomy.frequency):
            order = np.quantile(frequency.numpy(), 1 - _PLACES)
            colour = plots.shade(layer / max(1, layers - 1))
            axes.plot(_PLACES, order, color=colour, linewidth=1)
        level = np.mean([float(frequency.mean()) for frequency in anatomy.frequency])
        axes.axhline(level, color=plots.BLACK, linestyle="--", linewidth=1.2)
        axes.set_title(title, loc="left")
        axes.set_xlabel("neurons, busiest first")
        plots.percent(axes.xaxis)
    plots.percent(panels[0, 0].yaxis)
    panels[0, 0].set_ylabel("share of tokens it is active for")
    return figure


def by_layer(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Share of each layer's neurons never active (left) and active for most tokens (right), a line a model.

    `tables`: title -> the rows of `cats.anatomy.Anatomy.by_layer`.
    """
    figure, panels = plots.figure(3.4, ncols=2)
    for axes, (column, title) in zip(panels, _COUNTS.items(), strict=True):
        for number, (name, rows) in enumerate(tables.items()):
            axes.plot(rows.layer, rows[column], **plots.style(number), markersize=4, label=name)
        axes.set_title(title, loc="left")
        axes.set_xlabel("layer")
        top = max(0.05, 1.08 * max(rows[column].max() for rows in tables.values()))
        axes.set_ylim(-0.03 * top, top)  # marks at zero are whole
        axes.xaxis.get_major_locator().set_params(integer=True)
        plots.percent(axes.yaxis, decimals=0)
    panels[0].set_ylabel("neurons of the layer")
    plots.legend(figure, [panels[0]])
    return figure


def chunks(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Neurons that none of some consecutive tokens needs, over their number: a panel for each model.

    `tables`: title -> the rows of `cats.anatomy.Anatomy.chunks`. A thin line a layer; the mean of the layers
    thick, beside that of tokens independent of each other, with each neuron's frequency and without.
    """
    figure, panels = plots.figure(3.9, ncols=len(tables), sharey=True, squeeze=False)
    for axes, (title, rows) in zip(panels[0], tables.items(), strict=True):
        last = max(1, rows.layer.max())
        for layer, part in rows.groupby("layer"):
            axes.plot(part.chunk_tokens, part.sparsity, color=plots.shade(layer / last), linewidth=0.7)
        means = rows.groupby("chunk_tokens")[["sparsity", "by_frequency", "independent"]].mean()
        axes.plot(
            means.index, means.sparsity, color=plots.VERMILION, marker="o", linewidth=2.4, label="measured"
        )
        axes.plot(
            means.index,
            means.by_frequency,
            color=plots.BLACK,
            linestyle="--",
            label="independent tokens",
        )
        axes.plot(means.index, means.independent, color=plots.BLACK, linestyle=":", label="and neurons alike")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(rows.chunk_tokens.unique()))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_title(title, loc="left")
        axes.set_xlabel("consecutive tokens")
    panels[0, 0].set_ylim(bottom=0)
    plots.percent(panels[0, 0].yaxis)
    panels[0, 0].set_ylabel("neurons none of them needs")
    plots.legend(figure, [panels[0, 0]])
    return figure

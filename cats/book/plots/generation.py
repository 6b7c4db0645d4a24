"""Figures of the chapter on generation: where greedy texts part, and what is kept over sparsity."""

from collections.abc import Iterable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cats.book import plots

_APART = 0.008  # of sparsity, between series
_NATS = [-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


def agreement(curves: Iterable[pd.DataFrame]) -> Figure:
    """Share of prompts whose text still equals the dense model's over generated tokens, a line each label.

    `curves`: label, token, share (as `cats.book.analysis.generation_live.curve` gives them).
    """
    rows = pd.concat(curves)
    figure, axes = plots.figure(3.6)
    for number, (label, part) in enumerate(rows.groupby("label", sort=False)):
        look = plots.style(number) | {"marker": None}
        axes.step(part.token, part.share, where="post", label=label, **look)
    axes.set_ylim(0, 1.04)
    axes.set_xlim(0, rows.token.max())
    plots.percent(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="generated tokens", ylabel="texts equal so far")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def over_sparsity(rows: pd.DataFrame, ylabel: str, *, dense: float, log: bool = False) -> Figure:
    """A quantity over gate sparsity: values of the paper hollow, measured ones filled with intervals.

    `rows`: series, gate_sparsity, value, low, high (may be missing), reported, and `panel` where there are
    several. `dense`: the value without a mask, a grey line. `log`: linear to 0.1, logarithmic above; else
    the values are shares.
    """
    names = list(dict.fromkeys(rows.panel)) if "panel" in rows else [""]
    series = list(dict.fromkeys(rows.series))
    figure, panels = plots.figure(3.9, ncols=len(names), sharey=True, squeeze=False)
    handles: dict = {}
    for axes, name in zip(panels[0], names, strict=True):
        here = rows[rows.panel == name] if "panel" in rows else rows
        for each, part in here.groupby("series", sort=False):
            handles[each] = _points(axes, part.sort_values("gate_sparsity"), series.index(each))
        axes.axhline(dense, color=plots.GREY, linewidth=1.2)
        axes.set_title(name, loc="left")
        axes.set_xlabel("gate sparsity")
        axes.set_xlim(0.2, 1)
        axes.set_xticks([0.3, 0.5, 0.7, 0.9])
        plots.percent(axes.xaxis)
    if log:
        panels[0, 0].set_yscale("symlog", linthresh=0.1)
        panels[0, 0].set_yticks(_NATS, [f"{value:g}" for value in _NATS])
        low, high = float(rows.value.min()), float(rows[["value", "high"]].max().max())
        panels[0, 0].set_ylim(min(0.0, low - 0.02), max(0.2, 1.2 * high))
    else:
        panels[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].set_ylabel(ylabel)
    ordered = [each for each in series if each in handles]
    figure.legend(
        [handles[each] for each in ordered], ordered, loc="outside upper center", ncols=2, frameon=False
    )
    return figure


def _points(axes: Axes, part: pd.DataFrame, number: int):
    """One series of `over_sparsity`; returns what stands for it in the legend."""
    look = plots.style(number)
    if part.reported.iloc[0]:
        look |= {"color": plots.GREY, "linestyle": "none", "markerfacecolor": "white", "markersize": 8}
        return axes.plot(part.gate_sparsity, part.value, markeredgewidth=1.5, **look)[0]
    apart = part.gate_sparsity + _APART * (number % 5 - 2)  # or intervals would lie upon each other
    spread = [(part.value - part.low).clip(0).fillna(0), (part.high - part.value).clip(0).fillna(0)]
    return axes.errorbar(apart, part.value, yerr=spread, capsize=3, **look)

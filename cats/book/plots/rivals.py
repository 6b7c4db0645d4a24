"""Figures of the chapter on rivals: quality against bytes, rule by rule."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cats.book import plots
from cats.book.analysis import rivals

_LOOKS = {
    family: {"color": colour, "marker": marker}
    for family, colour, marker in zip(rivals.FAMILIES, plots.CYCLE, plots.MARKERS, strict=False)
}

_LEADER = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}


def pareto(
    frames: Mapping[str, pd.DataFrame], ylabel: str = "loss − dense, nats", *, log: bool = True
) -> Figure:
    """Quality lost over bytes a token, a panel for each model: a line a rule, from more bytes to fewer.

    `frames`: title -> rows with rule, megabytes and lost. The grey steps are the Pareto front: to the left
    of and below them is nothing. The log scale is linear between plus and minus a tenth.
    """
    most = max(rows.rule.nunique() for rows in frames.values())
    figure, panels = plots.figure((1.9 + 0.19 * most) * len(frames) + 0.8, nrows=len(frames), squeeze=False)
    for axes, (title, rows) in zip(panels[:, 0], frames.items(), strict=True):
        _panel(axes, rows, log)
        axes.set_title(title, loc="left")
        axes.set_ylabel(ylabel)
    panels[-1, 0].set_xlabel("MB of weights a token, 16 bits (fewer to the right)")
    met = {rivals.family(rule) for rows in frames.values() for rule in rows.rule}
    for family in [name for name in rivals.FAMILIES if name in met]:
        panels[0, 0].plot([], [], **_LOOKS[family], label=family)
    panels[0, 0].plot([], [], color=plots.LIGHT, linewidth=5, label="Pareto front")
    plots.legend(figure, [panels[0, 0]])
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, log: bool) -> None:
    if log:
        axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
        axes.yaxis.set_major_formatter("{x:g}")
    optimal = rows[rivals.front(rows.megabytes, rows.lost)].sort_values("megabytes")
    axes.step(
        optimal.megabytes, optimal.lost, where="post", color=plots.LIGHT, linewidth=5, solid_joinstyle="round"
    )
    ends = []
    for rule, part in rows.groupby("rule", sort=False):
        part = part.sort_values("megabytes", ascending=False)
        look = _LOOKS[rivals.family(rule)]
        heavy = {"linewidth": 2.6, "markersize": 7} if rule == "cats" else {"linewidth": 1.2, "markersize": 5}
        axes.plot(part.megabytes, part.lost, **look, **heavy)
        ends.append((part.megabytes.iloc[-1], part.lost.iloc[-1], rule, look["color"]))
    axes.invert_xaxis()
    axes.margins(x=0.06, y=0.08)
    _label(axes, sorted(ends, key=lambda end: end[1]))


def _label(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the axes, each at the height of its line's end or as near as they have room, led to it."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = _apart([to_axes.transform((x, y))[1] for x, y, _, _ in ends], min(0.1, 0.96 / len(ends)))
    for height, (x, y, name, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.06, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=10,
            arrowprops={**_LEADER, "color": colour},
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float, top: float = 0.98) -> list[float]:
    """Rising heights moved as little as keeps each `gap` above the one before it, and all below `top`."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = top
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], ceiling)
        ceiling = placed[place] - gap
    return placed

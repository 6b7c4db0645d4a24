"""Figures of the chapter on calibration transfer: the drift of each layer, and what it comes to."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cats.book import plots


def by_layer(lines: pd.DataFrame) -> Figure:
    """Realised minus target sparsity of each layer, a panel for each evaluated text and a line each label.

    `lines`: evaluated, label, layer, drift (a fraction).
    """
    names = list(dict.fromkeys(lines.evaluated))
    labels = list(dict.fromkeys(lines.label))
    figure, panels = plots.figure(2.2 * len(names) + 0.9, nrows=len(names), sharex=True, squeeze=False)
    for axes, name in zip(panels[:, 0], names, strict=True):
        for number, label in enumerate(labels):
            part = lines[(lines.evaluated == name) & (lines.label == label)]
            axes.plot(part.layer, 100 * part.drift, label=label, **plots.style(number) | {"markersize": 3})
        axes.axhline(0, color=plots.GREY, linewidth=1.2)
        axes.set_title(f"on {name}", loc="left")
        axes.set_ylabel("realised − target,\npoints")
    panels[-1, 0].set_xlabel("layer")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    plots.legend(figure, [panels[0, 0]])
    return figure


def dots(frames: Mapping[str, pd.DataFrame], value: str, xlabel: str, *, scale: float = 1.0) -> Figure:
    """A value for each evaluated text (down) and label (colour), a panel for each measurement, stacked.

    `frames`: title of the panel -> rows with evaluated, label, `value`, and delta_low, delta_high where the
    value is delta_nll or delta_acc. `scale`: 100 for percentage points.
    """
    labels = list(dict.fromkeys(label for rows in frames.values() for label in rows.label))
    heights = [0.35 + 0.15 * rows.evaluated.nunique() * len(labels) for rows in frames.values()]
    figure, panels = plots.figure(
        1.2 + sum(heights), nrows=len(frames), sharex=True, squeeze=False, height_ratios=heights
    )
    offsets = plots.offsets(len(labels), 0.3)
    handles: dict = {}
    for axes, (title, rows) in zip(panels[:, 0], frames.items(), strict=True):
        texts = list(dict.fromkeys(rows.evaluated))
        for number, label in enumerate(labels):
            part = rows[rows.label == label]
            places = [texts.index(text) + offsets[number] for text in part.evaluated]
            values = scale * part[value].to_numpy(dtype=float)
            spread = None
            if value.startswith("delta_"):
                low, high = (scale * part[name].to_numpy(dtype=float) for name in ("delta_low", "delta_high"))
                spread = np.nan_to_num([np.maximum(values - low, 0), np.maximum(high - values, 0)])
            look = plots.style(number) | {"linestyle": "none"}
            handles[label] = axes.errorbar(values, places, xerr=spread, capsize=3, markersize=5, **look)
        axes.axvline(0, color=plots.GREY, linewidth=1.2)
        axes.set_yticks(range(len(texts)), texts)
        axes.set_ylim(len(texts) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_title(title, loc="left")
    panels[-1, 0].set_xlabel(xlabel)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False)
    return figure

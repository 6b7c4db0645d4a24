"""Figures of the chapters on fine-tuning: curves, realised sparsity, checkpoints, recovery."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from cats.book import plots

BEFORE, AFTER = "before training", "after training"


def title(method: str) -> str:
    """A method as figures and tables call it: "CATS 50%" for "cats 0.5"."""
    rule, _, level = method.partition(" ")
    known = {"cats": "CATS", "relufication": "ReLUfication"}.get(rule, rule)
    share = f"{float(level):.0%}" if level.replace(".", "", 1).isdigit() else level
    return f"{known} {share}".strip()


def by_layer(rows: pd.DataFrame, column: str = "realised_by_layer") -> pd.DataFrame:
    """Tidy realised sparsity before the first step and after the last: sparsity, moment, layer, realised.

    `rows` of a record of fine-tuning: those of CATS as it was calibrated, over seeds.
    """
    cats = rows.method.str.startswith("cats ") & ~rows.method.str.contains("recalibrated")
    panels = rows[cats & rows[column].notna()]
    found = []
    for (sparsity, _), curve in panels.groupby(["sparsity", "seed"]):
        for moment, step in ((BEFORE, curve.step.min()), (AFTER, curve.step.max())):
            values = curve[curve.step == step][column].iloc[0]
            known = {"sparsity": sparsity, "moment": moment}
            found += [{**known, "layer": layer, "realised": value} for layer, value in enumerate(values)]
    tidy = pd.DataFrame(found, columns=["sparsity", "moment", "layer", "realised"])
    return tidy.groupby(["sparsity", "moment", "layer"], as_index=False).realised.mean()


def curves(frames: Mapping[str, pd.DataFrame], x: str = "step", xlabel: str = "optimizer steps") -> Figure:
    """A value over `x` for each method, a panel for each measurement: the mean over seeds, and their range.

    `frames`: title of the panel -> rows with method, seed, `x` and value; "dense" is drawn grey.
    """
    methods = _methods(frames)
    figure, panels = _grid(len(frames), 2.5)
    for axes, (heading, rows) in zip(panels, frames.items(), strict=True):
        for method in methods:
            part = rows[rows.method == method].groupby(x).value.agg(["mean", "min", "max"])
            if part.empty:
                continue
            look = _look(method, methods)
            band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
            axes.plot(part.index, part["mean"], **look, markersize=4, label=title(method))
            axes.fill_between(part.index, part["min"], part["max"], **band)
        axes.set_title(heading, loc="left")
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    plots.legend(figure, panels)
    return figure


def unequal(rows: pd.DataFrame) -> Figure:
    """Loss of one method at a whole and at half a batch, over steps (left) and over rows read (right).

    `rows`: method (which says the batch), step, rows_trained, value.
    """
    methods = _methods({"": rows})
    figure, panels = _grid(2, 2.7, sharey=True)
    for axes, x, label in zip(
        panels, ("step", "rows_trained"), ("optimizer steps", "rows trained on"), strict=True
    ):
        for method in methods:
            part = rows[rows.method == method].groupby(x).value.mean()
            axes.plot(part.index, part, **_look(method, methods), markersize=5, label=method)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[0].set_ylabel("loss, nats a token")
    plots.legend(figure, panels)
    return figure


def realised(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Realised gate sparsity of each layer before and after training, a panel for each text.

    `frames`: title of the panel -> what `by_layer` returns. Targets are dotted.
    """
    levels = sorted({level for rows in frames.values() for level in rows.sparsity})
    figure, panels = _grid(len(frames), 2.7, sharey=True)
    for axes, (heading, rows) in zip(panels, frames.items(), strict=True):
        for number, level in enumerate(levels):
            axes.axhline(level, color=plots.GREY, linestyle=":", linewidth=1.2)
            for moment, filled in ((BEFORE, False), (AFTER, True)):
                part = rows[(rows.sparsity == level) & (rows.moment == moment)]
                look = plots.style(number) | {"linestyle": "-" if filled else "none"}
                face = look["color"] if filled else "white"
                label = f"{level:.0%}, {moment}"
                axes.plot(part.layer, part.realised, **look, markerfacecolor=face, markersize=4, label=label)
        axes.set_title(heading, loc="left")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_ylabel("realised sparsity")
    plots.percent(panels[0].yaxis)
    plots.legend(figure, panels)
    return figure


def checkpoints(curve: pd.DataFrame, kept: Mapping[str, int], chance: float | None = None) -> Figure:
    """Accuracy over steps on rows that choose the checkpoint and on the test rows, and the checkpoints kept.

    `curve`: step, indomain_accuracy, accuracy; `kept`: name of a rule -> step; `chance`, dotted: the accuracy
    of a guess.
    """
    figure, axes = plots.figure(3.2)
    curve = curve.sort_values("step")
    for number, (column, label) in enumerate(
        (("indomain_accuracy", "rows that choose"), ("accuracy", "test rows"))
    ):
        axes.plot(curve.step, curve[column], **plots.style(number), label=label)
    names: dict[int, list[str]] = {}
    for name, step in kept.items():
        names.setdefault(step, []).append(name)
    for number, (step, rules) in enumerate(names.items()):
        axes.axvline(step, color=plots.GREY, linestyle="--", linewidth=1.2)
        axes.annotate(
            " and ".join(rules),
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + 14 * number),  # names of neighbouring steps stand on two lines
            textcoords="offset points",
            ha="center",
        )
    axes.set(xlabel="optimizer steps", ylabel="accuracy")
    if chance is not None:
        axes.axhline(chance, color=plots.GREY, linestyle=":", linewidth=1.2, label="a guess")
    axes.set_ylim(min(0.4, curve[["indomain_accuracy", "accuracy"]].min().min() - 0.05), 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    plots.percent(axes.yaxis)
    plots.legend(figure, [axes])
    return figure


def layers(lines: Mapping[str, Sequence[float]], target: float) -> Figure:
    """A share for each layer, a line for each name in `lines`; the target is dotted."""
    figure, axes = plots.figure(3.0)
    axes.axhline(target, color=plots.GREY, linestyle=":", linewidth=1.2)
    for number, (name, values) in enumerate(lines.items()):
        axes.plot(range(len(values)), values, **plots.style(number), markersize=4, label=name)
    axes.set(xlabel="layer", ylabel="share zeroed")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    plots.percent(axes.yaxis)
    plots.legend(figure, [axes])
    return figure


def recovery(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Gap to the dense model for each recipe (down), hollow before training and filled after it.

    On a logarithmic axis where every gap is above zero.

    `frames`: title of the panel -> rows with recipe, sparsity, before, after (nats a token).
    """
    recipes = list(dict.fromkeys(recipe for rows in frames.values() for recipe in rows.recipe))
    levels = sorted({level for rows in frames.values() for level in rows.sparsity})
    logarithmic = all(rows[["before", "after"]].min(axis=None) > 0 for rows in frames.values())
    offsets = plots.offsets(len(levels), 0.18)
    figure, panels = plots.figure(
        1.6 + 0.36 * len(recipes), ncols=len(frames), sharex=logarithmic, sharey=True, squeeze=False
    )
    for axes, (heading, rows) in zip(panels[0], frames.items(), strict=True):
        for number, level in enumerate(levels):
            part = rows[rows.sparsity == level]
            places = [recipes.index(recipe) + offsets[number] for recipe in part.recipe]
            look = plots.style(number) | {"linestyle": "none"}
            axes.hlines(places, part.before, part.after, color=look["color"], linewidth=1.4)
            axes.plot(part.before, places, **look, markerfacecolor="white")
            axes.plot(part.after, places, **look, label=f"{level:.0%} gate sparsity")
        if not logarithmic:
            axes.axvline(0, color=plots.GREY, linewidth=1.2)
        axes.set_title(heading, loc="left")
        axes.grid(axis="y", visible=False)
    if logarithmic:
        panels[0, 0].set_xscale("log")
        low, high = panels[0, 0].get_xlim()
        subs = (1,) if high > 30 * low else (1, 3)  # as many labels as a narrow panel has room for
        panels[0, 0].xaxis.set_major_locator(LogLocator(subs=subs, numticks=99))
        panels[0, 0].xaxis.set_major_formatter("{x:g}")
        panels[0, 0].xaxis.set_minor_locator(NullLocator())
    figure.supxlabel("loss − dense, nats", fontsize=11)
    panels[0, 0].set_yticks(range(len(recipes)), recipes)
    panels[0, 0].set_ylim(len(recipes) - 0.5, -0.5)
    plots.legend(figure, panels[0])
    return figure


def _methods(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    return list(dict.fromkeys(method for rows in frames.values() for method in rows.method))


def _look(method: str, methods: list[str]) -> dict:
    if method == "dense":
        return {"color": plots.GREY, "linestyle": "-", "marker": "o"}
    return plots.style([name for name in methods if name != "dense"].index(method))


def _grid(count: int, height: float, **options) -> tuple[Figure, Sequence[Axes]]:
    """`count` panels, two side by side, each `height` inches; empty ones are taken out."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure, panels = plots.figure(0.5 + height * rows, nrows=rows, ncols=columns, squeeze=False, **options)
    for axes in panels.flat[count:]:
        axes.remove()
    return figure, list(panels.flat[:count])

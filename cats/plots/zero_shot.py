"""Figures of the chapters on tasks: paired differences as a forest, and accuracy against sparsity."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cats import plots


def forest(rows: pd.DataFrame, *, delta: str = "delta_acc") -> Figure:
    """Paired difference to dense of each task (down) for each method and sparsity (colour), with intervals.

    `rows`: task, label, `delta`, delta_low, delta_high; rows without a difference are left out.
    """
    rows = rows[rows[delta].notna()]
    tasks, labels = list(dict.fromkeys(rows.task)), list(dict.fromkeys(rows.label))
    figure, axes = plots.figure(1.2 + 0.16 * len(tasks) * max(len(labels), 3) + 0.3)
    offsets = np.linspace(-0.32, 0.32, len(labels)) if len(labels) > 1 else [0.0]
    for number, label in enumerate(labels):
        part = rows[rows.label == label]
        places = [tasks.index(task) + offsets[number] for task in part.task]
        values = part[delta].to_numpy(dtype=float)
        below = values - part.delta_low.to_numpy(dtype=float)
        above = part.delta_high.to_numpy(dtype=float) - values
        look = plots.style(number)
        axes.errorbar(
            values,
            places,
            xerr=[np.maximum(below, 0), np.maximum(above, 0)],
            color=look["color"],
            marker=look["marker"],
            linestyle="none",
            markersize=5,
            label=label,
        )
    axes.axvline(0, color=plots.GREY, linewidth=1.2)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlabel("score − dense, same documents, 95 % interval")
    figure.legend(loc="outside upper center", ncols=min(len(labels), 3), frameon=False)
    return figure


def against_sparsity(rows: pd.DataFrame, *, score: str = "acc", label: str = "mean accuracy") -> Figure:
    """A score over gate sparsity (left) and over model-level sparsity (right), one line for each method.

    `rows`: method, gate_sparsity, model_sparsity, `score`, `score`_se. A row whose method is dense is drawn
    as a horizontal line; methods without a gate sparsity as a point over the model-level sparsity alone.
    """
    figure, (left, right) = plots.figure(3.6, ncols=2, sharey=True)
    dense = rows[rows.method == "dense"]
    ends: dict = {left: [], right: []}
    for number, method in enumerate(dict.fromkeys(rows[rows.method != "dense"].method)):
        part = rows[rows.method == method].sort_values("gate_sparsity")
        look = plots.style(number)
        for axes, column in ((left, "gate_sparsity"), (right, "model_sparsity")):
            known = part[part[column].notna()]
            if known.empty:
                continue
            x, y = known[column].to_numpy(dtype=float), known[score].to_numpy(dtype=float)
            error = 1.96 * known[f"{score}_se"].to_numpy(dtype=float)
            axes.errorbar(x, y, yerr=error, capsize=3, **look, label=method)
            ends[axes].append((x[-1], y[-1], method, look["color"]))
    for axes, name in ((left, "gate sparsity"), (right, "model-level sparsity")):
        for row in dense.itertuples():
            axes.axhline(getattr(row, score), color=plots.GREY, linestyle="--", linewidth=1.2)
        axes.set_xlabel(name)
        plots.percent(axes.xaxis)
    left.set_ylabel(label)
    handles, labels = left.get_legend_handles_labels()
    extra = [
        (handle, text)
        for handle, text in zip(*right.get_legend_handles_labels(), strict=True)
        if text not in labels
    ]
    handles, labels = handles + [h for h, _ in extra], labels + [t for _, t in extra]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def agreement(rows: pd.DataFrame) -> Figure:
    """Share of prompts whose greedy text still equals the dense model's, over generated tokens.

    `rows`: label, token (1, 2, …), share.
    """
    figure, axes = plots.figure(3.4)
    for number, label in enumerate(dict.fromkeys(rows.label)):
        part = rows[rows.label == label]
        look = plots.style(number)
        axes.step(
            part.token, part.share, where="mid", color=look["color"], linestyle=look["linestyle"], label=label
        )
    axes.set(xlabel="generated tokens", ylabel="prompts that still agree with dense", ylim=(0, 1.04))
    plots.percent(axes.yaxis)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def losses(rows: pd.DataFrame) -> Figure:
    """Rise of the loss over dense for each method (down) and sparsity (colour), with paired intervals.

    `rows`: method, gate_sparsity, delta_nll, delta_low, delta_high.
    """
    rows = rows[rows.delta_nll.notna()].assign(
        task=lambda frame: frame.method,
        label=lambda frame: [f"{value:.0%} gate sparsity" for value in frame.gate_sparsity],
    )
    figure = forest(rows, delta="delta_nll")
    figure.axes[0].set_xlabel("loss − dense, nats a token, same documents, 95 % interval")
    return figure

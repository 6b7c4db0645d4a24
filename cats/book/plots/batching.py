"""Figures of the chapter on batches: unions of masks, what they cost in bytes, and what was measured."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cats.book import plots

KINDS = {  # name in the rows: what figures call it, colour, marker
    "consecutive": ("next tokens of a text", plots.BLUE, "o"),
    "different": ("tokens of other texts", plots.VERMILION, "s"),
    "independent": ("independent masks", plots.BLACK, None),
}

_CROWDED = 0.96  # beyond this density the marks of a figure lie upon each other and get no label


def union(rows: pd.DataFrame) -> Figure:
    """Union density over the number of rows, a panel for each sparsity and a line for each kind of rows.

    `rows`: sparsity, rows, kind (see KINDS), union_density.
    """
    sparsities = sorted(rows.sparsity.unique())
    figure, panels = plots.figure(3.7, ncols=len(sparsities), sharey=True, squeeze=False)
    for axes, sparsity in zip(panels[0], sparsities, strict=True):
        here = rows[rows.sparsity == sparsity]
        for kind, (name, colour, marker) in KINDS.items():
            part = here[here.kind == kind].sort_values("rows")
            line = "--" if marker is None else "-"
            axes.plot(part.rows, part.union_density, color=colour, marker=marker, linestyle=line, label=name)
        _doubling(axes, here.rows.unique())
        axes.set_title(f"{sparsity:.0%} gate sparsity", loc="left")
        axes.set_ylim(0, 1.04)
        plots.percent(axes.yaxis)
    panels[0, 0].set_ylabel("neurons that some row keeps")
    plots.legend(figure, [panels[0, 0]])
    return figure


def by_layer(rows: pd.DataFrame) -> Figure:
    """Union density of each layer at one number of rows, a colour for each sparsity, over independent masks.

    `rows`: sparsity, layer, union_density, independent_density.
    """
    figure, axes = plots.figure(3.5)
    ends = []
    for index, (sparsity, part) in enumerate(rows.groupby("sparsity")):
        part, look = part.sort_values("layer"), plots.style(index)
        colour = look["color"]
        axes.plot(part.layer, part.union_density, color=colour, marker=look["marker"], markersize=4)
        axes.plot(part.layer, part.independent_density, color=colour, linestyle="--", linewidth=1.2)
        ends.append((part.layer.iloc[-1], part.union_density.iloc[-1], f"{sparsity:.0%}", colour))
    axes.set_ylim(0, 1.04)
    axes.set(xlabel="layer", ylabel="neurons that some row keeps")
    axes.xaxis.get_major_locator().set_params(integer=True)
    plots.percent(axes.yaxis)
    axes.set_xlim(right=rows.layer.max() * 1.12 + 0.5)
    plots.label_lines(axes, ends)
    axes.plot([], [], color=plots.GREY, label="measured masks")
    axes.plot([], [], color=plots.GREY, linestyle="--", linewidth=1.2, label="independent masks")
    axes.legend(loc="lower left", frameon=False)
    return figure


def against_rows(bounds: pd.DataFrame, measured: pd.DataFrame) -> Figure:
    """Time of an MLP call and rows per time over the number of rows, in units of dense with the fewest rows.

    `bounds`: sparsity, rows, union_density; drawn dashed as bytes, (1 + 2u)/3. `measured`: sparsity (0 for
    dense), batch, relative (time over that of dense with the fewest), drawn with markers; may be empty.
    """
    figure, (left, right) = plots.figure(3.9, ncols=2)
    counts = sorted(bounds.rows.unique())
    cases = {0.0: bounds[bounds.sparsity == bounds.sparsity.min()].assign(union_density=1.0)}
    cases |= {sparsity: part for sparsity, part in bounds.groupby("sparsity")}
    for index, (sparsity, part) in enumerate(cases.items()):
        look = plots.style(index - 1) if sparsity else {"color": plots.GREY, "marker": "x"}
        part = part.sort_values("rows")
        bytes_read = (1 + 2 * part.union_density.to_numpy()) / 3
        found = measured[measured.sparsity == sparsity].sort_values("batch") if len(measured) else measured
        name = f"CATS {sparsity:.0%}" if sparsity else "dense"
        for axes, values in ((left, lambda _, t: t), (right, lambda n, t: n / t)):
            x = part.rows.to_numpy()
            axes.plot(
                x, values(x, bytes_read), color=look["color"], linestyle="--", linewidth=1.3, label=name
            )
            if len(found):
                n, t = found.batch.to_numpy(), found.relative.to_numpy()
                axes.plot(n, values(n, t), color=look["color"], marker=look["marker"], linestyle="-")
    for axes in (left, right):
        _doubling(axes, counts)
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    left.set_ylim(bottom=0)
    left.set_ylabel("÷ dense, fewest rows")
    left.set_title("time of a call", loc="left")
    right.set_title("rows per time", loc="left")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(cases), frameon=False)
    return figure


def crossover(points: pd.DataFrame, measured: pd.DataFrame) -> Figure:
    """Speed-up over dense against union density: the bound 3/(1 + 2u), and where batches lie on it.

    `points`: sparsity, rows, union_density, drawn on the bound and labelled by their rows,
    where nothing is measured.
    `measured`: batch, union_density, speedup, one line for each batch; may be empty.
    """
    figure, axes = plots.figure(3.9)
    u = np.linspace(0.05, 1, 96)
    axes.plot(u, 3 / (1 + 2 * u), color=plots.BLACK, linestyle="--", linewidth=1.4, label="bytes")
    axes.axhline(1, color=plots.GREY, linewidth=1.2)
    if len(measured):
        for index, (batch, part) in enumerate(measured.groupby("batch")):
            part, look = part.sort_values("union_density"), {**plots.style(index), "linestyle": "-"}
            axes.plot(
                part.union_density,
                part.speedup,
                **look,
                linewidth=1.2,
                markersize=5,
                label=f"{batch} row{'s'[: batch > 1]}",
            )
    else:
        for index, (sparsity, part) in enumerate(points.groupby("sparsity")):
            density, look = part.union_density.to_numpy(), plots.style(index)
            axes.plot(
                density,
                3 / (1 + 2 * density),
                color=look["color"],
                marker=look["marker"],
                linestyle="none",
                label=f"{sparsity:.0%} gate sparsity",
            )
            shift = (-2, -14) if index % 2 == 0 else (3, 5)
            for row in part[part.union_density < _CROWDED].itertuples():
                place = (row.union_density, 3 / (1 + 2 * row.union_density))
                axes.annotate(
                    f"{row.rows}", place, xytext=shift, textcoords="offset points", color=look["color"]
                )
    axes.set(xlabel="union density", ylabel="speed-up over dense of the same batch", xlim=(0, 1.04))
    plots.percent(axes.xaxis)
    axes.legend(loc="upper right", frameon=False)
    return figure


def cpu_rows(rows: pd.DataFrame) -> Figure:
    """ms of an MLP call over the number of rows on this CPU, dense and CATS, with 5th and 95th percentiles.

    `rows`: batch, sparsity, variant (dense_best or cats), latency_us, latency_us_p5, latency_us_p95.
    """
    figure, axes = plots.figure(3.5)
    picked = rows[(rows.variant == "dense_best") | ((rows.variant == "cats") & (rows.sparsity > 0))]
    ends = []
    for index, ((_, sparsity), part) in enumerate(picked.groupby(["variant", "sparsity"], sort=False)):
        dense = part.variant.iloc[0] == "dense_best"
        look = {"color": plots.GREY, "marker": "x"} if dense else plots.style(index)
        part = part.sort_values("batch")
        ms = part.latency_us.to_numpy() / 1e3
        spread = [ms - part.latency_us_p5 / 1e3, part.latency_us_p95 / 1e3 - ms]
        axes.errorbar(
            part.batch, ms, yerr=spread, capsize=3, color=look["color"], marker=look["marker"], linestyle="-"
        )
        ends.append(
            (part.batch.iloc[-1], ms[-1], "dense" if dense else f"CATS {sparsity:.0%}", look["color"])
        )
    counts = sorted(picked.batch.unique())
    axes.set_xticks(counts)
    axes.set_xlim(counts[0] - 0.3, counts[-1] + 0.35 * max(np.ptp(counts), 1))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="rows", ylabel="ms a call")
    plots.label_lines(axes, ends, gap=0.09)
    return figure


def _doubling(axes, counts) -> None:
    """A logarithmic axis of rows with the counts themselves as ticks."""
    counts = sorted(int(count) for count in counts)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("rows")

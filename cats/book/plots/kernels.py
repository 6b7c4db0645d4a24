"""Figures of the chapters on kernels (the paper's Figs. 3 and 6) and on decoding (Fig. 4)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cats.book import plots


def latency(rows: pd.DataFrame) -> Figure:
    """µs of a gated MLP over sparsity, a colour for each shape, beside its bytes over bandwidth.

    `rows`: shape, sparsity, latency_us, latency_us_p5, latency_us_p95, bound_us, dense_us (of the best dense
    MLP).
    """
    figure, axes = plots.figure(4.0)
    ends = []
    for index, (shape, found) in enumerate(rows.groupby("shape", sort=False)):
        found = found.sort_values("sparsity")
        look = plots.style(index)
        s, colour = found.sparsity.to_numpy(), look["color"]
        low, high = found.latency_us - found.latency_us_p5, found.latency_us_p95 - found.latency_us
        axes.errorbar(s, found.latency_us, yerr=[low, high], color=colour, marker=look["marker"], capsize=2)
        axes.plot(s, found.bound_us, color=colour, linestyle="--", linewidth=1.2)
        axes.plot(s, found.dense_us, color=colour, linestyle=":", linewidth=1.4)
        ends.append((s[-1], found.latency_us.iloc[-1], shape, colour))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="gate sparsity", ylabel="latency, µs")
    axes.set_xlim(right=rows.sparsity.max() + 0.28 * np.ptp(rows.sparsity))
    axes.set_xticks(sorted(rows.sparsity.unique()))
    plots.percent(axes.xaxis)
    plots.label_lines(axes, ends)
    _key(axes, {"CATS": "-", "bytes / bandwidth": "--", "best dense": ":"})
    return figure


def speedup(rows: pd.DataFrame, reported: pd.DataFrame) -> Figure:
    """Speed-up of the gated MLP over dense against 1/(1 - 2s/3), and the paper's points in grey.

    `rows`: shape, sparsity, speedup; `reported`: kind ("CATS" or "optimal"), sparsity, speedup.
    """
    figure, axes = plots.figure(4.0)
    limit = 3.6
    s = np.linspace(0, 0.95, 96)
    axes.plot(s, 1 / (1 - 2 * s / 3), color=plots.BLACK, linestyle="--", linewidth=1.4)
    looks = {"CATS": dict(marker="o", facecolors="none"), "optimal": dict(marker="x")}
    for kind, look in looks.items():
        points = reported[(reported.kind == kind) & (reported.speedup < limit) & (reported.sparsity <= 0.95)]
        axes.scatter(
            points.sparsity,
            points.speedup,
            color=plots.GREY,
            s=26,
            linewidths=1.2,
            label=f"paper: {kind}",
            **look,
        )
    for index, (shape, found) in enumerate(rows.groupby("shape", sort=False)):
        found = found.sort_values("sparsity")
        look = {**plots.style(index), "linestyle": "-"}
        axes.plot(found.sparsity, found.speedup, label=shape, markersize=5, linewidth=1.3, **look)
    axes.axhline(1, color=plots.LIGHT, linewidth=1)
    axes.annotate(
        "reachable bound",
        (0.9, 2.5),
        xytext=(-6, 6),
        textcoords="offset points",
        ha="right",
        color=plots.BLACK,
    )
    axes.set(xlabel="gate sparsity", ylabel="speed-up over dense", ylim=(0.7, limit))
    plots.percent(axes.xaxis)
    axes.legend(loc="upper left", frameon=False)
    return figure


def live_latency(rows: pd.DataFrame) -> Figure:
    """The same on the reader's CPU for one shape: spread of the rounds, dense, and bytes over bandwidth.

    `rows`: sparsity, variant, latency_us, latency_us_p5, latency_us_p95, bound_us; variants cats, dense_best.
    """
    figure, axes = plots.figure(3.4)
    cats = rows[rows.variant == "cats"].sort_values("sparsity")
    dense = rows[rows.variant == "dense_best"].iloc[0]
    s, ms = cats.sparsity.to_numpy(), cats.latency_us.to_numpy() / 1e3
    spread = [ms - cats.latency_us_p5 / 1e3, cats.latency_us_p95 / 1e3 - ms]
    axes.hlines(dense.latency_us / 1e3, s[0], s[-1], color=plots.GREY, linestyle=":", linewidth=1.6)
    axes.errorbar(s, ms, yerr=spread, color=plots.BLUE, marker="o", capsize=3)
    axes.plot(s, cats.bound_us / 1e3, color=plots.BLACK, linestyle="--", linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_xlim(right=s[-1] + 0.3 * max(np.ptp(s), 0.1))
    axes.set_xticks(s, [f"{value:.0%}" for value in s])
    axes.set(xlabel="gate sparsity", ylabel="latency, ms")
    plots.label_lines(
        axes,
        [
            (s[-1], dense.latency_us / 1e3, "dense", plots.GREY),
            (s[-1], ms[-1], "CATS", plots.BLUE),
            (s[-1], cats.bound_us.iloc[-1] / 1e3, "bytes", plots.BLACK),
        ],
        gap=0.09,
    )
    return figure


def tokens_per_second(rows: pd.DataFrame) -> Figure:
    """Tokens/s of `generate` as bars with the range of the rounds; a dash is dense times the byte bound.

    `rows`: sparsity, tokens_per_s, tokens_per_s_low, tokens_per_s_high, bound_speedup; dense first.
    """
    figure, axes = plots.figure(3.4)
    rate = rows.tokens_per_s.to_numpy()
    places = np.arange(len(rows))
    colours = [plots.GREY, *[plots.BLUE] * (len(rows) - 1)]
    axes.bar(places, rate, width=0.55, color=colours)
    spread = [rate - rows.tokens_per_s_low, rows.tokens_per_s_high - rate]
    axes.errorbar(places, rate, yerr=spread, fmt="none", ecolor=plots.BLACK, capsize=4, linewidth=1.2)
    bounds = rate[0] * rows.bound_speedup.to_numpy()
    axes.hlines(bounds[1:], places[1:] - 0.36, places[1:] + 0.36, color=plots.VERMILION, linestyle="--")
    for place, value in zip(places, rate, strict=True):
        axes.annotate(
            f"{value:.1f}", (place, 0), xytext=(0, 5), textcoords="offset points", ha="center", color="white"
        )
    labels = ["dense" if s == 0 else f"CATS {s:.0%}" for s in rows.sparsity]
    axes.set_xticks(places, labels)
    axes.set(ylabel="tokens per second")
    axes.set_title("- - dense × byte bound", loc="right", color=plots.VERMILION)
    axes.grid(axis="x", visible=False)
    return figure


def reported_decoding(rows: pd.DataFrame, bounds: Mapping[str, float]) -> Figure:
    """The paper's speed-up of decoding over new tokens, with the byte bound of each model.

    `rows`: series, new_tokens, speedup; `bounds`: series → bound.
    """
    figure, axes = plots.figure(3.6)
    ends = []
    for index, (series, found) in enumerate(rows.groupby("series", sort=False)):
        found = found.sort_values("new_tokens")
        look = plots.style(index)
        axes.plot(found.new_tokens, found.speedup, **look)
        ends.append((found.new_tokens.iloc[-1], found.speedup.iloc[-1], series, look["color"]))
    last = rows.new_tokens.max()
    for bound in sorted(set(bounds.values())):
        axes.hlines(bound, rows.new_tokens.min(), last, color=plots.BLACK, linestyle=":", linewidth=1.2)
        of = "/".join(
            dict.fromkeys(name.split(",")[0].split("-")[0] for name in bounds if bounds[name] == bound)
        )
        ends.append((last, bound, f"bytes, {of}", plots.BLACK))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(rows.new_tokens.unique()), [f"{n:.0f}" for n in sorted(rows.new_tokens.unique())])
    axes.minorticks_off()
    axes.set_xlim(right=last * 2.6)
    axes.set_ylim(1.0, 1.05 * max(*bounds.values(), rows.speedup.max()))
    axes.set(xlabel="new tokens", ylabel="speed-up over dense")
    plots.label_lines(axes, ends)
    return figure


def roofline(rows: pd.DataFrame, bandwidth: float, fixed_us: float) -> Figure:
    """GB/s reached against the bytes of a call, under the measured bandwidth and with a fixed cost.

    `rows`: kind (drawn alike), megabytes, gbs; `bandwidth` in GB/s; `fixed_us`: µs of a call besides reading.
    """
    figure, axes = plots.figure(3.8)
    span = np.geomspace(0.8 * rows.megabytes.min(), 1.25 * rows.megabytes.max(), 100)
    axes.axhline(bandwidth, color=plots.BLACK, linestyle="--", linewidth=1.2)
    axes.plot(
        span, span * 1e3 / (fixed_us + span * 1e3 / bandwidth), color=plots.LIGHT, linewidth=6, zorder=1
    )
    looks = [(plots.GREY, "D"), (plots.BLUE, "o"), (plots.VERMILION, "^")]
    for (colour, marker), (kind, found) in zip(looks, rows.groupby("kind", sort=False), strict=False):
        axes.scatter(
            found.megabytes, found.gbs, color=colour, marker=marker, s=30, label=kind, zorder=2, linewidths=0
        )
    axes.set_xscale("log")
    ticks = [t for t in (20, 50, 100, 200, 500, 1000, 2000) if span[0] < t < span[-1]]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.12 * bandwidth)
    axes.set(xlabel="MB that a call must read", ylabel="GB/s reached")
    axes.annotate(
        "a kernel that only reads",
        (span[0], bandwidth),
        xytext=(2, 4),
        textcoords="offset points",
        va="bottom",
    )
    axes.legend(loc="lower right", frameon=False)
    return figure


def decoding_rates(rows: pd.DataFrame) -> Figure:
    """Tokens/s against gate sparsity, a panel a model: this book's loop, dense baselines, the byte bound.

    `rows`: geometry, variant, sparsity, new_tokens, tokens_per_s, bound_speedup; variants as the records name
    them: {dense, cats} x {loop, generate_static, generate_eager}.
    """
    names = list(dict.fromkeys(rows.geometry))
    figure, panels = plots.figure(3.9, ncols=len(names), sharey=True, squeeze=False)
    lengths = sorted(rows.new_tokens.unique())
    for axes, name in zip(panels[0], names, strict=True):
        here = rows[rows.geometry == name]
        loop = here[here.variant.isin(("dense_loop", "cats_loop"))].sort_values("sparsity")
        short = loop[loop.new_tokens == lengths[0]]
        axes.plot(
            short.sparsity, short.tokens_per_s.iloc[0] * short.bound_speedup,
            color=plots.BLACK, linestyle="--", linewidth=1.2, label="dense × byte bound",
        )  # fmt: skip
        for place, length in enumerate(lengths):
            found = loop[loop.new_tokens == length]
            if len(found):
                colour = plots.shade(1 - 0.45 * place)
                axes.plot(
                    found.sparsity, found.tokens_per_s, color=colour, marker="o", markersize=4,
                    label=f"loop, {length} tokens",
                )  # fmt: skip
        for variant, colour, marker in (("static", plots.ORANGE, "s"), ("eager", plots.GREY, "D")):
            found = here[here.variant.str.endswith(f"generate_{variant}")].sort_values("sparsity")
            axes.plot(
                found.sparsity, found.tokens_per_s, color=colour, marker=marker, markersize=4, linestyle=":",
                label={"static": "generate, static cache", "eager": "generate, eager"}[variant],
            )  # fmt: skip
        axes.set_title(name)
        ticks = sorted(here.sparsity.unique())
        axes.set_xticks(ticks, [f"{100 * s:.0f}" for s in ticks])
        axes.set_xlabel("gate sparsity, %")
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].set_ylabel("tokens per second")
    plots.legend(figure, list(panels[0]))
    return figure


def step(rows: pd.DataFrame) -> Figure:
    """µs of one decoded token by part, a stacked bar for each row; `rows`: one column a part, named rows."""
    figure, axes = plots.figure(0.9 + 0.62 * len(rows))
    colours = [plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE, plots.SKY, plots.LIGHT]
    start = np.zeros(len(rows))
    for (part, values), colour in zip(rows.items(), colours, strict=False):
        bars = axes.barh(
            rows.index, values, left=start, color=colour, label=part, height=0.6, edgecolor="white"
        )
        for bar, value in zip(bars, values, strict=True):
            if value > 0.06 * rows.sum(axis=1).max():
                axes.annotate(
                    f"{value:.0f}", (bar.get_x() + value / 2, bar.get_y() + bar.get_height() / 2),
                    ha="center", va="center", color="white" if colour == plots.BLUE else plots.BLACK,
                )  # fmt: skip
        start += values.to_numpy()
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="latency, µs", ylabel="one token")
    plots.legend(figure, [axes])
    return figure


def launches(rows: pd.DataFrame) -> Figure:
    """µs of one gated MLP when a CUDA graph starts it, and when Python starts each kernel.

    `rows`: name, graph_us, eager_us.
    """
    figure, axes = plots.figure(0.9 + 0.75 * len(rows))
    places = np.arange(len(rows))
    for shift, column, colour, hatch in (
        (-0.2, "graph_us", plots.BLUE, None),
        (0.2, "eager_us", plots.ORANGE, "//"),
    ):
        axes.barh(places + shift, rows[column], height=0.36, color=colour, hatch=hatch, edgecolor="white")
        for place, value in zip(places, rows[column], strict=True):
            axes.annotate(
                f"{value:.0f}", (value, place + shift), xytext=(4, 0), textcoords="offset points", va="center"
            )
    axes.set_yticks(places, rows["name"])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="latency, µs", ylabel="one gated MLP")
    axes.set_title("■ CUDA graph", loc="left", color=plots.BLUE)
    axes.set_title("▨ from Python", loc="right", color="#9A6700")
    return figure


def _key(axes, lines: Mapping[str, object]) -> None:
    """A legend of line kinds in grey, for figures where the colour says something else."""
    handles = [axes.plot([], [], color=plots.GREY, linestyle=line)[0] for line in lines.values()]
    axes.figure.legend(handles, list(lines), loc="outside upper center", frameon=False, ncols=len(lines))

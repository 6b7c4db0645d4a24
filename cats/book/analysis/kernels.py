"""Recorded times of one gated MLP: its gain, how near it is to its bytes, and what the rest is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cats.book.box import Box
from cats.book.comparison import Comparison
from cats.book.html_table import Table
from cats.book.words import listed
from cats.records import paper
from cats.records import record as records

LEVELS = (0.5, 0.7, 0.9)  # gate sparsities of tables and sentences
# name, weights moved in units of m·d at 50 %, the paper's method, variant in the records
WAYS = (
    ("dense", 3.0, "dense", None),
    ("mask, then multiply", 3.0, None, "cats_mask_dense"),
    ("gather, then multiply", 4.0, "index gather, unfused", "cats_gather"),
    ("separate launches", 2.0, "CATS kernel", "cats_separate"),
    ("fused (this book)", 2.0, None, "cats"),
)
_CHECKED = {
    "plain": "{} of {} tests of the kernels and of the decoding loop pass",
    "memcheck": "{} of {} under compute-sanitizer's memcheck, with {} errors",
    "racecheck": "{} of {} under its racecheck, with {} hazards",
}


@dataclass
class Measured:
    """Records of one GPU, one a shape: `rows` of batch 1 and independent masks, with the column `shape`."""

    records: list[records.Record]
    rows: pd.DataFrame

    @property
    def best(self) -> pd.DataFrame:
        """The fastest dense MLP of each shape, by shape."""
        return self.rows[self.rows.variant == "dense_best"].set_index("shape")

    @property
    def cats(self) -> pd.DataFrame:
        """CATS from a CUDA graph, with dense_us and speedup over the fastest dense MLP."""
        found = self.rows[(self.rows.variant == "cats") & (self.rows.launch == "graph")]
        return found.assign(
            dense_us=found["shape"].map(self.best.latency_us), speedup=found.speedup_over_best_dense
        )

    @property
    def device(self) -> str:
        return self.records[0].device

    def at(self, shape: str, sparsity: float) -> pd.Series:
        """CATS at one shape ("4096 × 11008") and sparsity."""
        return self.cats[(self.cats["shape"] == shape) & (self.cats.sparsity == sparsity)].iloc[0]


def title(shape: str) -> str:
    """A shape as figures write it: "4096x11008" is "4096 × 11008"."""
    return shape.replace("x", " × ")


def read(begin: str, shapes: Sequence[str]) -> Measured:
    """The records mlp_latency-<begin>-<shape>; CatsError where one is missing."""
    found = [records.read("mlp_latency", slug=f"{begin}-{shape}") for shape in shapes]
    rows = pd.concat(
        [record.rows.assign(shape=title(shape)) for shape, record in zip(shapes, found, strict=True)]
    )
    return Measured(found, rows[(rows.batch == 1) & (rows.masks == "independent")])


def box(measured: Measured) -> Box:
    """The chapter in a box; the interval is that of the timed rounds."""
    half = measured.cats[measured.cats.sparsity == 0.5]
    first, shares = half.iloc[0], measured.cats[measured.cats.sparsity.isin(LEVELS)].bound_share
    low, high = first.dense_us / first.latency_us_p95, first.dense_us / first.latency_us_p5
    return Box(
        "At batch 1, how much of the bytes that CATS does not read becomes time that it does not take?",
        f"At 50% sparsity one MLP of {first['shape']} is {first.speedup:.2f} times as fast as the fastest "
        f"compiled dense one ({low:.2f} to {high:.2f}, 5th to 95th percentile of the rounds), of 1.50 that "
        f"the bytes allow. Over all shapes and 50 to 90% the kernel reaches {shares.min():.0%} to "
        f"{shares.max():.0%} of its byte bound.",
        "fig-kernel-latency",
        f"One {measured.device}, bf16, one sequence, random weights and a CUDA graph. A call of few bytes is "
        "dominated by a fixed cost, and a batch needs more neurons.",
        "cats reproduce 08 -p source=measure",
    )


def on_paper_gpu(published: pd.DataFrame, method: str, sparsity: float = 0.5) -> float:
    """ms of Llama-2-7B's MLP in the paper's artefacts (L40S, fp32), interpolated between its sparsities."""
    found = published[(published.method == method) & (published.model == "Llama-2-7B")]
    found = found.sort_values("gate_sparsity")
    return float(np.interp(sparsity, found.gate_sparsity, found.value))


def ways(measured: Measured) -> Table:
    """Ways to the same result at 50 %: bytes over those of dense, and µs here and on the paper's GPU."""
    shape = measured.rows["shape"].iloc[0]
    rows = measured.rows[measured.rows["shape"] == shape]
    published = _published()
    lines = []
    for name, units, method, variant in WAYS:
        found = measured.best.loc[shape]
        if variant:
            found = rows[(rows.variant == variant) & (rows.sparsity == 0.5)]
            found = found.sort_values("launch", ascending=False).iloc[0]  # a graph where it can be captured
        lines.append(
            {
                "way": name,
                "bytes": units / 3,
                "L40S, µs": 1e3 * on_paper_gpu(published, method) if method else None,
                "here, µs": found.latency_us,
                "launched by": {"graph": "CUDA graph", "eager": "Python"}[found.launch],
            }
        )
    formats = {"bytes": "{:.0%}", "L40S, µs": "{:.0f}", "here, µs": "{:.0f}"}
    caption = f"One MLP of {shape} at 50% sparsity: bytes moved as a share of dense, and latency"
    return Table(pd.DataFrame(lines), formats, caption=caption)


def reported_speedups() -> pd.DataFrame:
    """The paper's points: kind ("CATS" or "optimal"), sparsity, speedup over its own dense MLP."""
    points = []
    for _, found in _published().groupby("model"):
        times = found.pivot_table(index="gate_sparsity", columns="method", values="value")
        for kind, method in (("CATS", "CATS kernel"), ("optimal", 'shrunk dense MLP ("optimal")')):
            gains = times["dense"] / times[method]
            points += [{"kind": kind, "sparsity": s, "speedup": gain} for s, gain in gains.items()]
    return pd.DataFrame(points)


def shares(measured: Measured) -> Table:
    """Share of the byte bound by shape and sparsity, the read bandwidth, and which dense MLP was fastest."""
    cats, best = measured.cats, measured.best
    share = cats[cats.sparsity.isin(LEVELS)].pivot(index="shape", columns="sparsity", values="bound_share")
    share = share.loc[cats["shape"].unique()]
    frame = pd.DataFrame(
        {
            "shape": share.index,
            **{f"{s:.0%}": share[s].to_list() for s in LEVELS},
            "GB/s": best.bandwidth_gbs[share.index].to_list(),
            "fastest dense": [
                name.removeprefix("dense_").replace("_", " ") for name in best.recipe[share.index]
            ],
        }
    )
    formats = {**{f"{s:.0%}": "{:.3f}" for s in LEVELS}, "GB/s": "{:.0f}"}
    return Table(frame, formats, caption="Share of the byte bound that is reached, by gate sparsity")


def above_bytes(rows: pd.DataFrame) -> pd.Series:
    """µs that a call takes beyond its bytes over the read bandwidth."""
    return rows.latency_us - rows.bound_us


def real_masks(record: records.Record) -> pd.DataFrame:
    """CATS from a CUDA graph under the masks of a real model, with the column above_us."""
    rows = record.rows
    rows = rows[(rows.launch == "graph") & (rows.variant == "cats")]
    return rows.assign(above_us=above_bytes(rows))


def real_table(masks: pd.DataFrame) -> Table:
    """Times under the masks of a real model beside the bytes that they read."""
    columns = {
        "sparsity": ("target sparsity", "{:.0%}"),
        "realised_sparsity": ("realised", "{:.1%}"),
        "bytes_mb": ("MB read", "{:.0f}"),
        "latency_us": ("latency, µs", "{:.1f}"),
        "above_us": ("above the bytes, µs", "{:.1f}"),
        "bound_share": ("share of the bound", "{:.2f}"),
        "speedup_over_best_dense": ("× dense", "{:.2f}"),
    }
    frame = masks[list(columns)].rename(columns={key: name for key, (name, _) in columns.items()})
    caption = "One MLP under the masks of a real model, mean over its layers"
    return Table(frame, dict(columns.values()), caption=caption)


def roofline(measured: Measured, masks: pd.DataFrame) -> pd.DataFrame:
    """Points of `plots.kernels.roofline`: kind, megabytes, gbs."""
    dense = measured.best[~measured.best.index.duplicated()].reset_index()
    kinds = {"dense, fastest": dense, "CATS": measured.cats, "CATS, masks of a real model": masks}
    return pd.concat(
        found.assign(kind=kind, megabytes=found.bytes_mb)[["kind", "megabytes", "gbs"]]
        for kind, found in kinds.items()
    )


def fixed_us(measured: Measured) -> float:
    """The median over all cells of what a call of CATS costs beyond its bytes, µs."""
    return float(above_bytes(measured.cats).median())


def checks(found: Sequence[records.Record]) -> str:
    """What the records `checks` say of the tests of the kernels, as a sentence."""
    parts = {}
    for record in found:
        for tool, rows in record.rows.groupby("tool"):
            passed = int((rows.outcome == "passed").sum())
            parts[tool] = _CHECKED[tool].format(passed, len(rows), rows.findings.iloc[0])
    words = listed([parts[tool] for tool in _CHECKED if tool in parts])
    return f"{words[0].upper()}{words[1:]}." if words else "No run of the tests is recorded yet."


def numbers(measured: Measured, masks: pd.DataFrame) -> dict:
    """What the page says of the records, by the names under which it is glued."""
    cats = measured.cats
    shown = cats[cats.sparsity.isin(LEVELS)]
    first = shown[shown["shape"] == shown["shape"].iloc[0]]
    keys = ["shape", "sparsity"]
    graph = measured.rows[measured.rows.launch == "graph"]
    atomic = graph[graph.variant == "cats_atomic"].set_index(keys).latency_us
    slower = atomic / cats.set_index(keys).latency_us
    gain, fixed = cats[cats.sparsity == 0.5].speedup, fixed_us(measured)
    return {
        "kernels_device": measured.device,
        "kernels_share_cells": len(shown),
        "kernels_share_reached": int((shown.bound_share >= 0.9).sum()),
        "kernels_gap_low": above_bytes(shown).min(),
        "kernels_gap_high": above_bytes(shown).max(),
        "kernels_gap_first_low": above_bytes(first).min(),
        "kernels_gap_first_high": above_bytes(first).max(),
        "kernels_atomic": slower.median(),
        "kernels_gain_low": gain.min(),
        "kernels_gain_high": gain.max(),
        "kernels_fixed": fixed,
        "kernels_large": 3 * fixed * cats.bandwidth_gbs.median() / 1e3,
        "kernels_llama_mb": first[first.sparsity == 0.5].bytes_mb.iloc[0],
        "kernels_real_mb": masks[masks.sparsity == 0.5].bytes_mb.iloc[0],
        "kernels_real_above_low": masks.above_us.min(),
        "kernels_real_above_high": masks.above_us.max(),
    }


def live_table(rows: pd.DataFrame) -> Table:
    """Times of this CPU: ms with the 5th to 95th percentile, the gain and its byte bound."""
    picked = rows[rows.variant.isin(["dense_best", "cats"])]
    picked = picked.sort_values(["variant", "sparsity"], ascending=[False, True])
    low, high = picked.latency_us_p5 / 1e3, picked.latency_us_p95 / 1e3
    name = picked.variant.map({"dense_best": "dense", "cats": "CATS"})
    frame = pd.DataFrame(
        {
            "MLP": [f"{n} {s:.0%}" if n == "CATS" else n for n, s in zip(name, picked.sparsity, strict=True)],
            "ms": picked.latency_us / 1e3,
            "5th to 95th percentile": [f"{a:.2f} to {b:.2f}" for a, b in zip(low, high, strict=True)],
            "× dense": picked.speedup_over_best_dense,
            "byte bound": 1 / (1 - 2 * picked.sparsity / 3),
            "GB/s": picked.gbs,
            "of bandwidth": picked.bound_share,
        }
    )
    formats = {"ms": "{:.2f}", "× dense": "{:.2f}", "byte bound": "{:.2f}", "GB/s": "{:.1f}"}
    caption = "One gated MLP on the CPU that made this page, by gate sparsity"
    return Table(frame, formats | {"of bandwidth": "{:.0%}"}, caption=caption)


def live_numbers(rows: pd.DataFrame, shape: Sequence[int]) -> dict:
    """What the page says of this CPU; the gain of the kernel itself apart from that of sparsity."""
    gains = rows[rows.variant == "cats"].set_index("sparsity").speedup_over_best_dense
    half, whole = (float(gains.get(s, np.nan)) for s in (0.5, 0.0))
    return {
        "kernels_live_shape": " × ".join(map(str, shape)),
        "kernels_live_bandwidth": rows.bandwidth_gbs.iloc[0],
        "kernels_live_gain": half,
        "kernels_live_zero": whole,
        "kernels_live_sparsity": half / whole,
    }


def comparisons(measured: Measured) -> list[Comparison]:
    """The paper's speed-ups of the MLP beside those recorded here."""
    found = []
    for model, shape in (("Llama-2-7B", "4096 × 11008"), ("Mistral-7B", "4096 × 14336")):
        for sparsity in (0.5, 0.7):
            keys = {"method": "CATS kernel", "model": model, "gate_sparsity": sparsity}
            reported = paper.reported("mlp_latency", quantity="MLP speed-up over dense", **keys)
            rows = measured.cats[(measured.cats["shape"] == shape) & (measured.cats.sparsity == sparsity)]
            found.append(
                Comparison(
                    f"kernels_{model.lower().replace('-', '_')}_{100 * sparsity:.0f}",
                    f"{model}, MLP speed-up at {sparsity:.0%}",
                    float(reported),
                    float(rows.speedup.iloc[0]) if len(rows) else None,
                    0.05,
                    f"one gated MLP, bfloat16, {measured.device}",
                    digits=2,
                    differs="other hardware, dtype and dense baseline",
                )
            )
    return found


def _published() -> pd.DataFrame:
    table = paper.table("mlp_latency")
    return table[table.quantity == "MLP latency"]

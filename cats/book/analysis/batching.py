"""Several sequences at once: unions of masks, what their bytes allow, and recorded times of a call."""

import math

import pandas as pd
from cats_kernels.crossover import CROSSOVER

from cats.book.analysis import recorded
from cats.book.box import Box
from cats.book.html_table import Table
from cats.records import record as records


def bound(union: float | pd.Series):
    """What the bytes allow over dense where `union` of the neurons is read, 3/(1 + 2u)."""
    return 3 / (1 + 2 * union)


def with_independent(found: pd.DataFrame) -> pd.DataFrame:
    """Means over the layers: sparsity, rows, kind, union_density; "independent" is a third kind."""
    columns = ["union_density", "independent_density"]
    mean = found.groupby(["sparsity", "rows", "kind"], as_index=False)[columns].mean()
    other = mean[mean.kind == "different"]
    other = other.assign(kind="independent", union_density=other.independent_density)
    return pd.concat([mean, other], ignore_index=True)


def unions_table(drawn: pd.DataFrame) -> Table:
    """Union density by sparsity and batch size; the bound is that of other texts."""
    wide = drawn.set_index(["sparsity", "rows", "kind"]).union_density.unstack("kind").reset_index()
    frame = pd.DataFrame(
        {
            "gate sparsity": wide.sparsity,
            "batch size": wide.rows,
            "next tokens": wide.consecutive,
            "other texts": wide.different,
            "independent": wide.independent,
            "bound, ×": bound(wide.different),
        }
    )
    shares = dict.fromkeys(("next tokens", "other texts", "independent"), "{:.1%}")
    formats = {"gate sparsity": "{:.0%}", "bound, ×": "{:.2f}", **shares}
    return Table(frame, formats, caption="Live: neurons that at least one sequence of the batch keeps")


def numbers(drawn: pd.DataFrame, layers: pd.DataFrame, count: int) -> dict:
    """What the page says of the live unions of `count` sequences, by the names under which it is glued."""
    at = drawn.set_index(["sparsity", "rows", "kind"]).union_density
    found = {"batching_rows": count}
    for name, level in (("low", drawn.sparsity.min()), ("high", drawn.sparsity.max())):
        found |= {
            f"batching_{name}": level,
            f"batching_{name}_union": at[level, count, "different"],
            f"batching_{name}_next": at[level, count, "consecutive"],
            f"batching_{name}_independent": at[level, count, "independent"],
            f"batching_{name}_bound": bound(at[level, count, "different"]),
        }
    spread = layers[layers.sparsity == layers.sparsity.max()].union_density
    return found | {"batching_layer_least": spread.min(), "batching_layer_most": spread.max()}


def overlap_table(record: records.Record) -> Table:
    """The recorded unions of other texts by batch size and sparsity."""
    rows = record.rows[record.rows.kind == "different"]
    wide = rows.pivot_table(index="rows", columns="sparsity", values="union_density")
    shown = {f"{level:.0%} gate sparsity": wide[level].to_list() for level in wide}
    frame = pd.DataFrame({"batch size": wide.index, **shown})
    caption = "Recorded: neurons that at least one sequence keeps, other texts"
    return Table(frame, dict.fromkeys(shown, "{:.1%}"), caption=caption)


def timed(record: records.Record | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """CATS and dense from a CUDA graph, with relative (time over dense with fewest); empty without one."""
    if record is None:
        return pd.DataFrame(), pd.DataFrame()
    dense = record.rows[record.rows.variant == "dense_best"]
    one = dense[dense.batch == dense.batch.min()].latency_us.min()
    cats = record.rows[(record.rows.launch == "graph") & (record.rows.variant == "cats")]
    cats = cats.assign(relative=cats.latency_us / one, speedup=cats.speedup_over_best_dense)
    return cats, dense.assign(relative=dense.latency_us / one)


def alone(cats: pd.DataFrame) -> pd.DataFrame:
    """Those of `timed` whose masks have nothing in common by design, or are those of texts."""
    return cats[(cats.correlation == 0) | (cats.masks == "texts")] if len(cats) else cats


def points(record: records.Record | None) -> pd.DataFrame:
    """Measured points of `plots.batching.against_rows`."""
    cats, dense = timed(record)
    return pd.concat([dense.assign(sparsity=0.0), alone(cats)]) if len(cats) else pd.DataFrame()


def times_table(cats: pd.DataFrame) -> Table:
    """Every recorded time of a batch."""
    rows = cats.sort_values(["correlation", "sparsity", "batch"])
    frame = pd.DataFrame(
        {
            "batch size": rows.batch,
            "correlation": rows.correlation,
            "gate sparsity": rows.sparsity,
            "union": rows.union_density,
            "µs": rows.latency_us,
            "tokens/ms": 1e3 * rows.batch / rows.latency_us,
            "× dense": rows.speedup_over_best_dense,
            "of the byte bound": rows.bound_share,
        }
    )
    forms = ("{}", "{:.1f}", "{:.0%}", "{:.0%}", "{:.1f}", "{:.0f}", "{:.2f}", "{:.0%}")
    caption = "Recorded times of a batch, random weights"
    return Table(frame, dict(zip(frame, forms, strict=True)), caption=caption)


def limits_table() -> Table:
    """Up to which union the module takes the sparse kernel on a GPU, by hidden size and batch size."""
    columns = ("hidden size, up to", "batch size, up to", "sparse kernel up to a union of")
    limits = [(size, batch, union) for size, unions in CROSSOVER.items() for batch, union in unions.items()]
    formats = {columns[0]: lambda size: "any" if math.isinf(size) else f"{size:.0f}", columns[2]: "{:.0%}"}
    caption = "Where the module changes to dense products with masks"
    return Table(pd.DataFrame(limits, columns=columns), formats, caption=caption)


def live_table(rows: pd.DataFrame) -> Table:
    """CATS on this CPU by batch size and sparsity."""
    cats = rows[rows.variant == "cats"]
    frame = pd.DataFrame(
        {
            "batch size": cats.batch,
            "gate sparsity": cats.sparsity,
            "union": cats.union_density,
            "ms": cats.latency_us / 1e3,
            "× dense": cats.speedup_over_best_dense,
            "byte bound": bound(cats.union_density),
        }
    )
    forms = ("{}", "{:.0%}", "{:.0%}", "{:.2f}", "{:.2f}", "{:.2f}")
    caption = "Live: one gated MLP on the CPU that made this page"
    return Table(frame, dict(zip(frame, forms, strict=True)), caption=caption)


def box(record: records.Record | None, level: float = 0.5) -> Box:
    """The chapter in a box: the recorded gain by batch size at one sparsity, independent masks."""
    cats = alone(timed(record)[0])
    answer = "No batch is recorded."
    if len(cats):
        rows = cats[cats.sparsity == level].sort_values("batch")
        first, last = rows.iloc[0], rows.iloc[-1]
        dense_us = last.speedup * last.latency_us
        low, high = dense_us / last.latency_us_p95, dense_us / last.latency_us_p5
        answer = (
            f"At {level:.0%} gate sparsity the gain of one MLP over dense falls from {first.speedup:.2f} "
            f"at batch size {first.batch} to {last.speedup:.2f} at {last.batch} ({low:.2f} to {high:.2f}, "
            f"5th to 95th percentile), where the masks together keep {last.union_density:.0%} of the neurons."
        )
    return Box(
        "What is left of the saving when several sequences are decoded at once?",
        answer,
        "fig-batching-crossover",
        "Random weights and independent masks, the careful case: real masks overlap in part.",
        "cats reproduce 10 -p source=measure",
    )


def recorded_words(slug: str) -> str:
    """Where the times of a batch come from, and the gains by batch size, in sentences."""
    cats = alone(timed(recorded.find("mlp_latency", slug))[0])
    words = [recorded.sentence("mlp_latency", slug)]
    for level in sorted(cats.sparsity.unique()) if len(cats) else ():
        part = cats[cats.sparsity == level].sort_values("batch")
        gains = ", ".join(f"{gain:.2f}" for gain in part.speedup)
        sizes = ", ".join(map(str, part.batch))
        words.append(f"At {level:.0%} the gain over dense is {gains} at batch sizes {sizes}.")
    return " ".join(words)

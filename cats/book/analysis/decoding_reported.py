"""Decoding as the paper's artefacts have it, beside its byte bound, and one MLP launched in two ways."""

from collections.abc import Mapping

import pandas as pd

from cats.book.analysis.decoding import Rates
from cats.book.comparison import Comparison
from cats.book.html_table import Table
from cats.core.accounting import Accounting
from cats.records import paper

_BYTES = {"fp32": 4, "bf16": 2}


def speedups() -> pd.DataFrame:
    """The reported speed-ups: series ("Llama-2-7B, fp32"), new_tokens, speedup."""
    rows = paper.table("decoding")
    rows = rows[(rows.quantity == "decode speed-up over dense") & rows.new_tokens.notna()]
    series = rows.model + ", " + rows.dtype
    return pd.DataFrame({"series": series, "new_tokens": rows.new_tokens, "speedup": rows.value})


def bounds(accounts: Mapping[str, Accounting]) -> dict[str, float]:
    """The byte bound at 50 % of each reported series."""
    return {name: accounts[name.split(",")[0]].speedup_bound(0.5) for name in speedups().series.unique()}


def throughput() -> pd.DataFrame:
    """Tokens/s by series, columns dense and CATS: geometric means over the lengths."""
    rows = paper.table("decoding")
    rows = rows[rows.quantity == "decode throughput"]
    rows = rows.assign(series=rows.model + ", " + rows.dtype)
    return rows.pivot_table(index="series", columns="method", values="value", sort=False)


def reading(accounts: Mapping[str, Accounting]) -> dict[str, float]:
    """GB/s that dense decoding reads by series: its tokens/s times the bytes of a token."""
    read = {}
    for series, rate in throughput()["dense"].items():
        model, dtype = series.split(", ")
        read[series] = rate * accounts[model].bytes_per_token(0, _BYTES[dtype]) / 1e9
    return read


def table(accounts: Mapping[str, Accounting]) -> Table:
    """Reported rates with their gain, its bound, and what dense decoding reads."""
    rates = throughput()
    frame = pd.DataFrame(
        {
            "L40S, 50%": rates.index,
            "dense": rates["dense"].to_list(),
            "CATS": rates["CATS"].to_list(),
            "× dense": (rates["CATS"] / rates["dense"]).to_list(),
            "byte bound": [bounds(accounts)[series] for series in rates.index],
            "GB/s": [reading(accounts)[series] for series in rates.index],
        }
    )
    formats = {"dense": "{:.1f}", "CATS": "{:.1f}", "× dense": "{:.2f}", "byte bound": "{:.2f}"}
    caption = "Tokens a second in the paper's artefacts, averaged over the lengths; GB/s is what dense reads"
    return Table(frame, formats | {"GB/s": "{:.0f}"}, caption=caption)


def launches(mlp_rows: pd.DataFrame) -> pd.DataFrame:
    """µs of one MLP from a CUDA graph and from Python: name, graph_us, eager_us; dense twice, then CATS."""
    timed = mlp_rows[mlp_rows.batch == 1]
    compiled = timed[timed.variant == "dense_best"].iloc[0].recipe
    cases = {
        "dense, PyTorch": ("dense_eager", 0.0),
        "dense, compiled": (compiled, 0.0),
        "CATS 50%": ("cats", 0.5),
    }
    lines = []
    for name, (variant, sparsity) in cases.items():
        rows = timed[(timed.variant == variant) & (timed.sparsity == sparsity)].set_index("launch").latency_us
        graph, eager = (float(pd.Series(rows[launch]).iloc[0]) for launch in ("graph", "eager"))
        lines.append({"name": name, "graph_us": graph, "eager_us": eager})
    return pd.DataFrame(lines)


def numbers(accounts: Mapping[str, Accounting], started: pd.DataFrame) -> dict:
    """What the page says of the paper's setting and of launches; `started` as of `launches`."""
    rates, read = throughput()["dense"], reading(accounts)
    fp32, bf16 = "Mistral-7B, fp32", "Mistral-7B, bf16"
    latency = paper.table("mlp_latency")
    latency = latency[(latency.model == "Llama-2-7B") & (latency.quantity == "MLP latency")]
    eager, _, sparse = (row for _, row in started.iterrows())
    return {
        "decoding_fp32_gbs": read[fp32],
        "decoding_bf16_gbs": read[bf16],
        "decoding_half_bytes": rates[bf16] / rates[fp32],
        "decoding_l40s_mlp": latency[latency.method == "dense"].value.median() * 1e3,
        "decoding_sparse_graph": sparse.graph_us,
        "decoding_sparse_eager": sparse.eager_us,
        "decoding_dense_eager": eager.eager_us,
        "decoding_graph_gain": started.graph_us[:2].min() / sparse.graph_us,
        "decoding_eager_gain": eager.eager_us / sparse.eager_us,
    }


def comparisons(rates: Rates) -> list[Comparison]:
    """The paper's Figure 4 beside what was recorded here at 512 tokens."""
    found = []
    for name in ("Llama-2-7B", "Mistral-7B"):
        reported = paper.reported(
            "decoding",
            item="Fig. 4",
            quantity="decode speed-up over dense",
            model=name,
            task="geometric mean over 256 to 2048 tokens",
        )
        found.append(
            Comparison(
                f"decoding_{name.lower().replace('-', '_')}",
                f"{name}, decoding at 50%: × dense",
                float(reported),
                rates.gain(name, 0.5, 512),
                0.05,
                f"random weights, 512 tokens, bfloat16, {rates.device}",
                digits=2,
                differs="other hardware, dtype and dense baseline",
            )
        )
    return found

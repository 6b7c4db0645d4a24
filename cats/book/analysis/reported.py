"""Two disputes that arithmetic settles: a perplexity of 2.18, and 15 % against 18 and 21 %."""

import numpy as np
import pandas as pd

from cats.book.html_table import Table
from cats.records import paper


def losses() -> pd.DataFrame:
    """The reported losses: model, method, value, and over_dense and as_nats, both ways to read the rise."""
    rows = paper.table("perplexity")
    rows = rows[rows.unit == "nats"]
    dense = rows.groupby("model").value.transform("first")
    return rows.assign(over_dense=rows.value / dense - 1, as_nats=np.exp(rows.value - dense) - 1)


def losses_table() -> Table:
    """The reported values, their rise as printed and as a rise of perplexity."""
    rows = losses()
    frame = pd.DataFrame(
        {
            "model": rows.model,
            "method": rows.method,
            'as reported, "perplexity"': rows.value,
            "over dense": rows.over_dense,
            "read as nats: perplexity": np.exp(rows.value),
            "its rise over dense": rows.as_nats,
            "read as perplexity: nats": np.log(rows.value),
        }
    )
    formats = dict(zip(frame.columns[2:], ("{:.3f}", "{:+.1%}", "{:.2f}", "{:+.1%}", "{:.3f}"), strict=True))
    return Table(frame, formats, caption="What the rebuttal reports, read in both ways")


def reading() -> dict[str, float]:
    """exp of the dense loss of Llama-2-7B, and the perplexity that TEAL prints for it on WikiText-2."""
    keys = {"model": "Llama-2-7B", "method": "dense"}
    nats = float(paper.reported("perplexity", quantity="nll_nats (reported as perplexity)", **keys))
    teal = float(paper.reported("later_papers", item="TEAL Table 1", **keys))
    return {"disputed_reading": float(np.exp(nats)), "disputed_teal": teal}


def speedups_table() -> Table:
    """Geometric means of the reported speed-ups over the four lengths, as throughput and as latency."""
    rows = paper.table("decoding")
    rows = rows[(rows.quantity == "decode speed-up over dense") & rows.new_tokens.notna()]
    means = np.exp(np.log(rows.value.astype(float)).groupby([rows.model, rows.dtype]).mean())
    frame = means.reset_index(name="speed-up")
    frame["more throughput"] = frame["speed-up"] - 1
    frame["lower latency"] = 1 - 1 / frame["speed-up"]
    formats = {"speed-up": "{:.3f}", "more throughput": "{:.1%}", "lower latency": "{:.1%}"}
    return Table(frame, formats, caption="Reported speed-ups of decoding, mean over four lengths")

"""Recorded losses of several models on several texts, beside the values that the paper's rebuttal gives."""

import pandas as pd

from cats.book.analysis import recorded
from cats.records import paper

_QUANTITY = "nll_nats (reported as perplexity)"


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one text as a page shows it: a line each rule and sparsity, a column each record.

    Of dense the loss and its perplexity, of the others the "rise [95 %]" in nats.
    """
    lines: dict[str, dict] = {}

    def put(name: str, row, text: str) -> None:
        lines.setdefault(name, {"nats a token": name})[row.record] = text

    for _, row in rows.iterrows():
        if row.rule == "dense":
            put("dense", row, f"{row.nll_nats:.3f}")
            put("dense, as perplexity", row, f"{row.perplexity:.2f}")
        elif not pd.isna(row.delta_nll):
            rise = f"{row.delta_nll:+.3f} [{row.delta_low:+.3f}, {row.delta_high:+.3f}]"
            put(recorded.label(row), row, rise)
    names = ["nats a token", *dict.fromkeys(rows.record)]
    return pd.DataFrame(list(lines.values())).reindex(columns=names)


def rises(rows: pd.DataFrame) -> pd.DataFrame:
    """The rise of CATS' loss over dense, for `cats.plots.generation.over_sparsity`.

    The rebuttal's two models stand first, in each text's panel, or alone where nothing is recorded.
    """
    measured = rows[(rows.rule == "cats") & rows.delta_nll.notna()] if len(rows) else rows
    panels = list(dict.fromkeys(measured.corpus)) if len(measured) else [""]
    points = []
    for panel in panels:
        for name in ("Llama-2-7B", "Mistral-7B"):
            dense, sparse = (
                float(paper.reported("perplexity", model=name, method=method, quantity=_QUANTITY))
                for method in ("dense", "CATS")
            )
            points.append(_point(panel, f"{name}, paper", 0.5, sparse - dense, None, None, True))
        points += [
            _point(panel, row.record, row.gate_sparsity, row.delta_nll, row.delta_low, row.delta_high, False)
            for row in (measured[measured.corpus == panel].itertuples() if len(measured) else ())
        ]
    return pd.DataFrame(points).astype({"low": float, "high": float})


def _point(panel: str, series: str, sparsity: float, value: float, low, high, reported: bool) -> dict:
    known = {"series": series, "gate_sparsity": sparsity, "value": value, "low": low, "high": high}
    return {"panel": panel, **known, "reported": reported}

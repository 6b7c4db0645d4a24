"""Recorded losses of several models on several texts, beside the values that the paper's rebuttal gives."""

from collections.abc import Mapping

import pandas as pd

from cats.book.analysis import recorded
from cats.book.box import Box
from cats.book.comparison import Comparison
from cats.book.html_table import Table
from cats.book.words import interval, listed
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


def tables(rows: pd.DataFrame) -> list[Table]:
    """`table` of each text of recorded `rows` as a page shows it."""
    found = []
    for name, part in rows.groupby("corpus", sort=False) if len(rows) else ():
        frame = table(part)
        frame.columns = [frame.columns[0], *map(recorded.model_name, frame.columns[1:])]
        caption = (
            f"Loss on {name}, {part.documents.iloc[0]} documents, {part.tokens.max():,.0f} tokens at most: "
            "dense, and the rise over it with 95% intervals"
        )
        found.append(Table(frame, caption=recorded.quality(caption, part)))
    return found


def rises(rows: pd.DataFrame) -> pd.DataFrame:
    """The rise of CATS' loss over dense, for `cats.plots.generation.over_sparsity`.

    The rebuttal's two models stand first, in each text's panel, or alone where nothing is recorded.
    """
    measured = rows[(rows.rule == "cats") & rows.delta_nll.notna()] if len(rows) else rows
    panels = list(dict.fromkeys(measured.corpus)) if len(measured) else [""]
    points = []
    for panel in panels:
        for name in ("Llama-2-7B", "Mistral-7B"):
            dense, sparse = (_reported(name, method) for method in ("dense", "CATS"))
            points.append(_point(panel, f"{name}, paper", 0.5, sparse - dense, None, None, True))
        points += [
            _point(panel, row.record, row.gate_sparsity, row.delta_nll, row.delta_low, row.delta_high, False)
            for row in (measured[measured.corpus == panel].itertuples() if len(measured) else ())
        ]
    return pd.DataFrame(points).astype({"low": float, "high": float})


def box(rows: pd.DataFrame) -> Box:
    """The chapter in a box: CATS at 50 % on the first text of each record; `rows` of `perplexity` records."""
    phrases = []
    for name, part in rows.groupby("record", sort=False) if len(rows) else ():
        part = part[(part.rule == "cats") & (part.gate_sparsity == 0.5) & part.delta_nll.notna()]
        if len(part):
            row = part.iloc[0]
            rise = interval(row.delta_nll, row.delta_low, row.delta_high)
            phrases.append(f"{rise} on {recorded.model_name(name)} ({row.corpus})")
    paper_rise = [_reported("Llama-2-7B", method) for method in ("CATS", "dense")]
    return Box(
        "How much worse does a model predict text under CATS?",
        f"At 50% gate sparsity, without training, the loss rises by these nats a token, with 95% intervals: "
        f"{listed(phrases) or 'nothing is recorded'}. The rebuttal's Llama-2-7B rises by "
        f"{paper_rise[0] - paper_rise[1]:.3f}.",
        "fig-perplexity",
        "Other models and texts than the paper's; the figure is the live run on this page, on few documents.",
        "cats reproduce 03 --profile llama-2-7b",
    )


def live_table(results: pd.DataFrame) -> Table:
    """The sweep of the page: `results` of `cats.evaluation.sweep`, dense first."""
    dense, rises = results.iloc[0], results.iloc[1:].itertuples()
    frame = pd.DataFrame(
        {
            "gate sparsity": results.gate_sparsity,
            "realised": results.realised_sparsity,
            "model sparsity": results.model_sparsity,
            "loss, nats": results.nll_nats,
            "perplexity": results.perplexity,
            "loss − dense [95%]": [
                None,
                *(interval(row.delta_nll, row.delta_low, row.delta_high) for row in rises),
            ],
            "perplexity / dense": results.perplexity / dense.perplexity,
        }
    )
    formats = dict.fromkeys(("realised", "model sparsity"), "{:.1%}")
    formats |= dict.fromkeys(("perplexity", "perplexity / dense"), "{:.2f}")
    formats |= {"gate sparsity": "{:.0%}", "loss, nats": "{:.3f}"}
    return Table(frame, formats, caption="Live: the same documents, dense and sparse")


def comparisons(dense, half, differs: Mapping[str, str], setting: str) -> list[Comparison]:
    """The rebuttal's losses beside those of the page; `dense` and `half`: rows of the sweep.

    `differs`: the paper's model -> what is not as there, empty where nothing differs.
    """
    found = []
    for name, other in differs.items():
        base, cats = _reported(name, "dense"), _reported(name, "CATS")
        key = f"perplexity_{name.lower().replace('-', '_')}"
        cases = (
            ("dense", "dense: loss, nats", base, dense.nll_nats, 0.05),
            ("cats", "CATS 50%: loss, nats", cats, half.nll_nats, 0.05),
            ("rise", "CATS 50% − dense: nats", cats - base, half.delta_nll, 0.01),
        )
        found += [
            Comparison(f"{key}_{case}", f"{name}, {what}", value, float(own), tol, setting, differs=other)
            for case, what, value, own, tol in cases
        ]
    return found


def differences(model: str, corpus: str) -> dict[str, str]:
    """What is not as in the rebuttal, by its model."""
    own = paper.MODELS.get(model)
    return {
        name: ", ".join(
            [*(["other model"] if own != name else []), *(["other text"] if corpus != "refinedweb" else [])]
        )
        for name in ("Llama-2-7B", "Mistral-7B")
    }


def _reported(model: str, method: str) -> float:
    return float(paper.reported("perplexity", model=model, method=method, quantity=_QUANTITY))


def _point(panel: str, series: str, sparsity: float, value: float, low, high, reported: bool) -> dict:
    known = {"series": series, "gate_sparsity": sparsity, "value": value, "low": low, "high": high}
    return {"panel": panel, **known, "reported": reported}

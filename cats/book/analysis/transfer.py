"""One text's thresholds on another text: the sparsity that arrives and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from cats.criteria import Fit
from cats.criteria.rule import applied
from cats.evaluation import intervals
from cats.evaluation.perplexity import document_nll

_KINDS = {"cats": "fixed", "online": "online"}  # by rule: what tables and figures call the thresholds


@dataclass
class Reading:
    """What a model did on documents.

    `scores`: document, tokens, nll_nats (as `cats.evaluation.document_nll`); `by_layer` [L], fp64: share of
    the gate activations of all tokens that was zeroed in each layer, None for a dense model.
    """

    scores: pd.DataFrame
    by_layer: torch.Tensor | None


def read(
    model,
    tokenizer,
    documents: Sequence[str],
    *,
    fit: Fit | None = None,
    sparsity: float | None = None,
    tokens: int | None = None,
    max_length: int = 1024,
) -> Reading:
    """Score the beginnings of `documents`, `tokens` each; dense without a `fit`.

    Every token is masked, the paper's policy. A fit that steers reads the documents one after the other, and
    does so between two of them. The model is dense afterwards. Raises CatsError as `document_nll` and
    `fit.apply` do.
    """
    scores = []
    with applied(model, fit, sparsity) as masking, masking.announcing():
        groups = [list(documents)] if masking.steer is None else [[text] for text in documents]
        for number, group in enumerate(groups):
            part = document_nll(
                model, tokenizer, group, max_length=max_length, tokens_per_document=tokens, progress=False
            )
            scores.append(part.assign(document=part.document + number))
        realised = masking.realised()
    shares = torch.tensor(realised["prefill"]["by_layer"], dtype=torch.float64) if realised else None
    return Reading(pd.concat(scores, ignore_index=True), shares)


def row(reading: Reading, dense: Reading, **columns) -> dict:
    """A line of the chapter's tables: `columns`, the realised sparsity, its drift from gate_sparsity and that
    of the layer that is farthest off, and delta_nll, delta_low, delta_high to `dense` on the same documents.
    """
    drift = reading.by_layer - columns["gate_sparsity"]
    return {
        **columns,
        "realised_sparsity": float(reading.by_layer.mean()),
        "drift": float(drift.mean()),
        "worst_layer": float(drift[drift.abs().argmax()]),
        **intervals.paired_interval(dense.scores, reading.scores),
    }


def from_records(rows: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """Recorded rows of a transfer as those of the live half: calibrated, evaluated, drift and label added.

    `prefix`: of the records' names, which end with the text that was calibrated on.
    """
    if not len(rows):
        return rows
    rows = rows[rows.rule.isin(list(_KINDS))]
    rows = rows.assign(
        calibrated=rows.record.str.removeprefix(prefix),
        evaluated=rows["corpus"] if "corpus" in rows else rows["task"],
        drift=rows.realised_sparsity - rows.gate_sparsity,
    )
    order = ["evaluated", "calibrated", "rule"]
    return rows.assign(label=rows.apply(label, axis=1)).sort_values(order, ignore_index=True)


def by_layer(reading: Reading, line: dict) -> pd.DataFrame:
    """The drift of each layer over all documents, for `cats.plots.transfer.by_layer`; `line` as of `row`."""
    drift = reading.by_layer - line["gate_sparsity"]
    return pd.DataFrame(
        {
            "evaluated": line["evaluated"],
            "label": label(line),
            "gate_sparsity": line["gate_sparsity"],
            "layer": range(len(drift)),
            "drift": drift.numpy(),
        }
    )


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Live or recorded rows as a page shows them: what was realised, and the difference to dense."""
    accuracy = "delta_acc" in rows
    scale, form, name = (
        (100, "+.1f", "− dense, points [95 %]") if accuracy else (1, "+.3f", "loss − dense [95 %]")
    )
    value = "delta_acc" if accuracy else "delta_nll"
    rows = rows.sort_values(["gate_sparsity"], kind="stable")
    deltas = zip(rows[value], rows.delta_low, rows.delta_high, strict=True)
    return pd.DataFrame(
        {
            "read": rows.evaluated,
            "calibrated on": rows.calibrated,
            "thresholds": rows.rule.map(_KINDS),
            "target": rows.gate_sparsity,
            "realised": rows.realised_sparsity,
            **({"worst layer": rows.gate_sparsity + rows.worst_layer} if "worst_layer" in rows else {}),
            name: [
                None if pd.isna(each[0]) else intervals.as_text(*each, form, scale=scale) for each in deltas
            ],
        }
    )


def words(rows: pd.DataFrame) -> str:
    """What recorded tasks say of the choice of text, in a sentence or two; `rows` of `from_records`."""
    if not len(rows):
        return "No run of these thresholds on tasks is recorded yet."
    sentences = []
    for level, part in rows.groupby("gate_sparsity"):
        fixed = part[part.rule == "cats"]
        means = fixed.groupby("calibrated", sort=False).agg({"drift": ["min", "max"], "delta_acc": "mean"})
        each = [
            f"from {text} drift by {100 * line['drift', 'min']:+.1f} to {100 * line['drift', 'max']:+.1f} "
            f"points and change the mean accuracy by {100 * line['delta_acc', 'mean']:+.1f} points"
            for text, line in means.iterrows()
        ]
        online = part[part.rule == "online"]
        follow = ""
        if len(online):
            follow = (
                f"; corrected online they drift by at most {100 * online.drift.abs().max():.1f} points "
                f"and change it by {100 * online.delta_acc.mean():+.1f}"
            )
        sentences.append(f"At {level:.0%}, fixed thresholds {', those '.join(each)}{follow}.")
    return " ".join(sentences)


def label(row) -> str:
    """What a line is called: its calibration text, and whether its thresholds are fixed or follow online."""
    return f"from {row['calibrated']}, {_KINDS[row['rule']]}"

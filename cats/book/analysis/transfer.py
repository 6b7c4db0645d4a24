"""One text's thresholds on another text: the sparsity that arrives and what it costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from cats.book.analysis import recorded
from cats.book.box import Box
from cats.book.html_table import Table
from cats.book.words import interval, tidy
from cats.core.thresholds import Thresholds
from cats.criteria import Fit
from cats.criteria.online import OnlineFit
from cats.criteria.rule import ThresholdFit, applied
from cats.evaluation import intervals
from cats.evaluation.perplexity import document_nll
from cats.records.packing import unpack

_KINDS = {"cats": "fixed", "online": "online"}  # by rule: what tables and figures call the thresholds


@dataclass
class Reading:
    """What a model did on documents.

    `scores`: document, tokens, nll_nats (as `cats.evaluation.document_nll`); `by_layer` [L], fp64: share of
    the gate activations of all tokens that was zeroed in each layer, None for a dense model.
    """

    scores: pd.DataFrame
    by_layer: torch.Tensor | None


@dataclass
class Crossing:
    """Thresholds of each text on each text: `rows` as of `row` with a label, `layers` as of `by_layer`, and
    `tokens`, read in all; `read`: text -> tokens of each reading.
    """

    rows: pd.DataFrame
    layers: pd.DataFrame
    read: dict[str, int]
    tokens: int


def cross(
    model,
    tokenizer,
    thresholds: Mapping[str, Thresholds],
    documents: Mapping[str, Sequence[str]],
    sparsities: Iterable[float],
    **options,
) -> Crossing:
    """Read the held-out `documents` of each text with the thresholds of each, by name; `options` of `read`.

    Thresholds that follow the text are read too, on the text that they were not calibrated on.
    """
    rows, layers, counts, total = [], [], {}, 0
    for evaluated, texts in documents.items():
        dense = read(model, tokenizer, texts, **options)
        counts[evaluated] = int(dense.scores.tokens.sum())
        fits = [(name, ThresholdFit("cats", found)) for name, found in thresholds.items()]
        fits += [
            (name, OnlineFit("online", found)) for name, found in thresholds.items() if name != evaluated
        ]
        for calibrated, fit in fits:
            for sparsity in sparsities:
                reading = read(model, tokenizer, texts, fit=fit, sparsity=sparsity, **options)
                names = {"calibrated": calibrated, "evaluated": evaluated, "rule": fit.rule}
                rows.append(row(reading, dense, gate_sparsity=sparsity, **names))
                layers.append(by_layer(reading, rows[-1]))
        total += counts[evaluated] * (1 + sum(each["evaluated"] == evaluated for each in rows))
    frame = pd.DataFrame(rows)
    return Crossing(frame.assign(label=frame.apply(label, axis=1)), pd.concat(layers), counts, total)


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


def box(rows: pd.DataFrame) -> Box:
    """The chapter in a box: the second text's thresholds in place of the first's at 50 %, on the same tasks.

    `rows`: of `from_records`, of zero_shot records.
    """
    answer = "No run of these thresholds on tasks is recorded yet."
    fixed = rows[(rows.rule == "cats") & (rows.gate_sparsity == 0.5)] if len(rows) else rows
    if len(fixed):
        one, other = list(dict.fromkeys(fixed.calibrated))[:2]
        scores = fixed.pivot(index="evaluated", columns="calibrated", values="correct").dropna()
        pairs = [tuple(map(unpack, each)) for each in zip(scores[one], scores[other], strict=True)]
        found = intervals.mean_difference(pairs)
        change = interval(found["delta"], found["low"], found["high"], digits=1, scale=100)
        drifts = interval(fixed.drift.min(), None, None, digits=1, scale=100)
        most = interval(fixed.drift.max(), None, None, digits=1, scale=100)
        answer = (
            f"On {recorded.spelled(fixed.model.iloc[0])} at 50% gate sparsity, thresholds from {other} in "
            f"place of {one} change the mean accuracy of {len(pairs)} tasks by {change} points, with its 95% "
            f"interval. The realised sparsity of a task drifts by {drifts} to {most} points from the target."
        )
    return Box(
        "Do thresholds depend on the text that they were calibrated on?",
        answer,
        "fig-drift",
        "One model, read back from 4 bits, and two texts as unlike as program documentation and plays. Part "
        "of the difference is that thresholds of one text drop more than those of the other.",
        "cats evaluate --plan data/plans/transfer.yml --data-dir MIRRORS --output runs",
    )


def live_table(rows: pd.DataFrame) -> Table:
    """Live rows as a page shows them."""
    formats = {"target": "{:.0%}"} | dict.fromkeys(("realised", "worst layer"), "{:.1%}")
    return Table(table(rows), formats, caption="Live: thresholds of each text on held-out text of each")


def by_level(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Model and gate sparsity -> recorded rows, for `plots.transfer.dots`."""
    groups = rows.groupby("gate_sparsity") if len(rows) else ()
    return {f"{recorded.spelled(part.model.iloc[0])}, {level:.0%}": part for level, part in groups}


def recorded_tables(rows: pd.DataFrame) -> list[Table]:
    """A table for each gate sparsity of recorded rows, of texts or of tasks."""
    found = []
    for title, part in by_level(rows).items():
        kind = "questions a task" if "delta_acc" in part else "documents a text"
        caption = f"{title} gate sparsity, at most {part.documents.max():,} {kind}"
        frame = table(part).drop(columns="target")
        found.append(Table(frame, {"realised": "{:.1%}"}, caption=recorded.quality(caption, part)))
    return found


def live_words(found: Crossing, model: str) -> str:
    """By how much live thresholds miss their target on the text of their own kind and on the other."""
    rows = found.rows
    away, home = rows[rows.calibrated != rows.evaluated], rows[rows.calibrated == rows.evaluated]
    if away.empty:
        return "Both texts are the same one: nothing is transferred."
    fixed, online = away[away.rule == "cats"], away[away.rule == "online"]
    return tidy(
        f"On {model}, over all layers fixed thresholds miss the target on the other text by up to "
        f"{_most(fixed.drift)} percentage points, but in a single layer by up to {_most(fixed.worst_layer)}, "
        f"where thresholds of the text's own kind miss by up to {_most(home.worst_layer)}. Corrected online, "
        f"no layer misses the target on the other text by more than {_most(online.worst_layer)}, documents "
        f"before the correction included. At most {max(found.read.values())} tokens of each text were read."
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
    return tidy(" ".join(sentences))


def label(row) -> str:
    """What a line is called: its calibration text, and whether its thresholds are fixed or follow online."""
    return f"from {row['calibrated']}, {_KINDS[row['rule']]}"


def _most(drifts: pd.Series) -> str:
    return f"{100 * drifts.abs().max():.1f}"

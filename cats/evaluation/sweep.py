"""The loss of one model, dense and at several sparsities, on the same documents."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from torch import nn

from cats.calibration.observe import SparsityMeter
from cats.core.accounting import account
from cats.core.sparsify import restore, sparsify
from cats.core.structure import cats_mlps
from cats.core.thresholds import Thresholds
from cats.core.thresholds import sparsities as check_sparsities
from cats.evaluation.intervals import paired_interval
from cats.evaluation.perplexity import document_nll, perplexity

DELTAS = ("delta_nll", "delta_low", "delta_high")


@dataclass
class Sweep:
    """Scores at several sparsities.

    `results`: a row for each, the dense model (0) first: gate_sparsity, realised_sparsity, model_sparsity,
    documents, tokens, nll_nats, perplexity, and the paired delta_nll, delta_low, delta_high, interval.
    `by_document`: gate_sparsity, document, tokens, delta_nll (the rise of its loss a token over dense).
    """

    results: pd.DataFrame
    by_document: pd.DataFrame

    def at(self, sparsity: float) -> pd.Series:
        """The row of one sparsity."""
        return self.results[self.results.gate_sparsity == sparsity].iloc[0]


def sweep(
    model: nn.Module,
    tokenizer,
    thresholds: Thresholds,
    documents: Sequence[str],
    sparsities: Sequence[float],
    *,
    seed: int = 0,
    **options,
) -> Sweep:
    """Score `documents` dense and at each gate sparsity; `options` are those of `document_nll`.

    Intervals are 95 %, over documents, both models on the same ones (`intervals.difference` with `seed`), and
    NaN below eight documents. The model is dense afterwards, also where this fails. Raises CatsError where
    thresholds, sparsities or documents do not fit.
    """
    documents = list(documents)
    check_sparsities(sparsities, len(sparsities))
    thresholds.check(model)
    restore(model)  # one that is sparse already would be its own baseline
    dense = document_nll(model, tokenizer, documents, **options)
    rows = [
        {
            "gate_sparsity": 0.0,
            "realised_sparsity": 0.0,
            "model_sparsity": 0.0,
            **perplexity(dense),
        }
    ]
    deltas = []
    shape = account(model)
    try:
        for sparsity in sparsities:
            sparsify(model, thresholds, sparsity)
            with SparsityMeter(model) as meter:
                scores = document_nll(model, tokenizer, documents, **options)
            rows.append(
                {
                    "gate_sparsity": sparsity,
                    "realised_sparsity": float(meter.overall) - _overhead(model),
                    "model_sparsity": shape.model_sparsity(sparsity),
                    **perplexity(scores),
                    **paired_interval(dense, scores, seed=seed),
                }
            )
            rise = (scores.nll_nats - dense.nll_nats) / dense.tokens
            columns = {"document": dense.document, "tokens": dense.tokens, "delta_nll": rise}
            deltas.append(pd.DataFrame({"gate_sparsity": sparsity, **columns}))
    finally:
        restore(model)
    by_document = pd.concat(deltas) if deltas else pd.DataFrame()
    return Sweep(pd.DataFrame(rows).astype({name: float for name in DELTAS if sparsities}), by_document)


def _overhead(model: nn.Module) -> float:
    """What the rule `centred` reads on top, as a share of all neurons."""
    modules = cats_mlps(model)
    neurons = sum(module.intermediate_size for module in modules)
    return sum(module.overhead * module.intermediate_size for module in modules) / neurons

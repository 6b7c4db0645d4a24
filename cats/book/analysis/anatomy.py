"""Measures of activation sparsity from the field: how often each neuron is active, what several tokens need
together, and what a budget of perplexity allows."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from cats_kernels import crossover
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.core.accounting import account
from cats.core.structure import find_gated_mlps
from cats.criteria import Fit
from cats.criteria.masking import Masking
from cats.criteria.rule import applied
from cats.errors import CatsError
from cats.evaluation.perplexity import document_nll, perplexity

CHUNKS = (1, 2, 4, 8, 16, 32)


@dataclass
class Anatomy:
    """Which neurons were active for `tokens` tokens of text.

    `frequency`: of each layer [m], the share of tokens for which a neuron was active (fp64). `chunks`: a row
    for each layer and number of consecutive tokens: layer, chunk_tokens, chunks (how many), sparsity (the
    share of neurons that none of the tokens needs), by_frequency (the same if each neuron kept its frequency
    but tokens were independent) and independent (if all neurons had the layer's frequency as well).
    """

    tokens: int
    frequency: list[Tensor]
    chunks: pd.DataFrame

    def by_layer(self, often: float = 0.5) -> pd.DataFrame:
        """A row for each layer: layer, neurons, sparsity (mean share of inactive neurons), never_active (the
        share of neurons without one active token), often_active (active for more than `often` of the tokens),
        always_active, and busiest_tenth (the share of all activity that the busiest tenth of neurons has).
        """
        rows = []
        for layer, frequency in enumerate(self.frequency):
            order = frequency.sort(descending=True).values
            total = float(order.sum())
            rows.append(
                {
                    "layer": layer,
                    "neurons": len(order),
                    "sparsity": 1 - float(order.mean()),
                    "never_active": float((order == 0).double().mean()),
                    "often_active": float((order > often).double().mean()),
                    "always_active": float((order == 1).double().mean()),
                    "busiest_tenth": float(order[: max(1, len(order) // 10)].sum()) / total if total else 0.0,
                }
            )
        return pd.DataFrame(rows)


@torch.no_grad()
def measure(model: nn.Module, batches, sizes: Sequence[int] = CHUNKS, *, progress: bool = True) -> Anatomy:
    """Which neurons of the gated MLPs are active on `batches`, as of `cats.corpora.batches`.

    A neuron is active for a token where what W_down reads of it is not zero: so for a ReLU model as it is
    (Lazy Neuron, arXiv 2210.06313), and for any other under a rule of `cats.criteria` that is applied. Chunks
    (BlockFFN, arXiv 2507.08771) are runs of consecutive tokens of a row, without overlap; what is left at a
    row's end is not counted. Padding takes no part. Raises CatsError for rows shorter than the longest chunk.
    """
    mlps = find_gated_mlps(model)
    counts = [torch.zeros(mlp.intermediate_size, dtype=torch.int64) for mlp in mlps]
    quiet = {(layer, size): [0.0, 0] for layer in range(len(mlps)) for size in sizes}
    tokens = 0
    valid: Tensor | None = None

    def see(layer: int, h: Tensor) -> None:
        active = (h != 0).reshape(*valid.shape, -1)
        counts[layer] += active[valid.to(active.device)].sum(0).cpu()
        for row, inside in zip(active, valid, strict=True):
            _add(quiet, layer, row[inside.to(row.device)], sizes)

    with _watched(model, see) as masking:
        for batch in tqdm(batches, desc="observing", unit="batch", disable=None if progress else True):
            valid = batch["attention_mask"].bool()
            tokens += int(valid.sum())
            masking.begin("prefill", valid.to(model.device))
            model.get_decoder()(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                use_cache=False,
            )
    longest = max(sizes)
    if not tokens or not all(count for _, count in quiet.values()):
        raise CatsError(f"No row of the text has {longest} tokens: give longer rows or shorter chunks.")
    frequency = [count.double() / tokens for count in counts]
    return Anatomy(tokens, frequency, _chunks(quiet, frequency))


def budgeted_sparsity(
    model: nn.Module,
    tokenizer,
    fit: Fit,
    documents: Sequence[str],
    *,
    budget: float = 0.01,
    most: float = 0.95,
    tolerance: float = 0.005,
    progress: bool = True,
    **options,
) -> dict:
    """The largest sparsity of a rule whose perplexity is at most 1 + `budget` times the dense model's.

    So PPL-1% of the Sparsing Law (arXiv 2411.02335) at 0.01, for any rule; its own rule gives each layer the
    threshold of one relative error, which is not here. Found by bisection to `tolerance` below `most`, where
    perplexity rises with sparsity. `options` are those of `cats.evaluation.document_nll`. Returns sparsity
    (the rule's own), realised_sparsity (of neurons, None where a rule drops others), realised_model_sparsity,
    by_layer (realised), perplexity, dense_perplexity and steps. The model is dense afterwards.
    """
    if budget <= 0:
        raise CatsError(f"A budget of {budget:g} allows nothing: give the rise of perplexity, 0.01 for 1 %.")
    options = {"progress": False, **options}
    dense = perplexity(document_nll(model, tokenizer, documents, **options))["perplexity"]
    shape = account(model)
    best = {"sparsity": 0.0, "perplexity": dense, "realised": None}
    low, high, steps = 0.0, most, 0
    with tqdm(desc="budget", unit="step", disable=None if progress else True) as bar:
        while high - low > tolerance:
            # the end first: a rule may stay inside the budget altogether
            sparsity = most if steps == 0 else (low + high) / 2
            found = _scored(model, tokenizer, fit, sparsity, documents, options)
            steps += 1
            bar.update()
            if found["perplexity"] <= (1 + budget) * dense:
                low, best = sparsity, found
            else:
                high = sparsity
    realised = best["realised"] or {"gate_sparsity": 0.0, "skipped_weights": 0.0, "by_layer": []}
    return {
        "rule": fit.rule,
        "budget": budget,
        "sparsity": best["sparsity"],
        "realised_sparsity": realised["gate_sparsity"],
        "realised_model_sparsity": realised["skipped_weights"] / shape.block_weights,
        "by_layer": realised["by_layer"],
        "perplexity": best["perplexity"],
        "dense_perplexity": dense,
        "steps": steps,
    }


def _scored(model, tokenizer, fit: Fit, sparsity: float, documents, options: dict) -> dict:
    with applied(model, fit, sparsity) as masking, masking.announcing():
        scores = document_nll(model, tokenizer, documents, **options)
        realised = masking.realised()["prefill"]
    return {
        "sparsity": sparsity,
        "perplexity": perplexity(scores)["perplexity"],
        "realised": realised,
    }


@contextmanager
def _watched(model: nn.Module, see):
    """`see(layer, h)` with what W_down of each layer reads; inside a Masking, so that no kernel hides it."""
    mlps = find_gated_mlps(model)
    with Masking(model) as masking:
        handles = [
            getattr(mlp.module, mlp.layout.down).register_forward_hook(
                lambda module, args, output, layer=mlp.layer: see(layer, args[0])
            )
            for mlp in mlps
        ]
        try:
            yield masking
        finally:
            for handle in handles:
                handle.remove()


def _add(quiet: dict, layer: int, active: Tensor, sizes: Sequence[int]) -> None:
    """Count the neurons that no token of a chunk needs, for the tokens [n, m] of one row."""
    for size in sizes:
        groups = len(active) // size
        if groups:
            needed = active[: groups * size].unflatten(0, (groups, size)).any(1)
            counts = quiet[layer, size]
            counts[0] += float((~needed).double().mean()) * groups
            counts[1] += groups


def _chunks(quiet: dict, frequency: list[Tensor]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": layer,
            "chunk_tokens": size,
            "chunks": groups,
            "sparsity": total / groups,
            "by_frequency": float((1 - frequency[layer]).pow(size).mean()),
            "independent": 1 - crossover.union_density(size, 1 - float(frequency[layer].mean())),
        }
        for (layer, size), (total, groups) in quiet.items()
    )

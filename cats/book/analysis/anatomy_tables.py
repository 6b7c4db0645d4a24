"""Tables and sentences of the chapter on the anatomy of sparsity: activity, chunks of tokens, budgets."""

from collections.abc import Mapping

import pandas as pd

from cats.book.analysis.anatomy import Anatomy
from cats.book.box import Box
from cats.book.html_table import Table

_MEASURES = {
    "sparsity": "realised sparsity",
    "never_active": "neurons never active",
    "often_active": "neurons active for most tokens",
    "always_active": "neurons active for every token",
    "busiest_tenth": "activity that the busiest tenth has",
}
TRAINED, RANDOM = "trained", "random weights"


def means(both: Mapping[str, Anatomy]) -> pd.DataFrame:
    """Each measure of activity, mean over the layers: a column each model."""
    return pd.DataFrame({name: found.by_layer()[list(_MEASURES)].mean() for name, found in both.items()})


def activity_table(both: Mapping[str, Anatomy]) -> Table:
    """`means` as a table."""
    frame = means(both).rename(index=_MEASURES).reset_index(names="mean over the layers")
    return Table(frame, dict.fromkeys(both, "{:.1%}"), caption="How often neurons are active")


def never(found: Anatomy) -> str:
    """How many neurons no token activated, as a clause."""
    rows = found.by_layer()
    count, total = int((rows.never_active * rows.neurons).round().sum()), int(rows.neurons.sum())
    if count:
        return f"{count:,} of {total:,} neurons are active for no token at all"
    return f"each of the {total:,} neurons is active for some token"


def unneeded(found: Anatomy) -> pd.DataFrame:
    """By chunk_tokens: sparsity, by_frequency, independent, means over the layers."""
    return found.chunks.groupby("chunk_tokens")[["sparsity", "by_frequency", "independent"]].mean()


def chunks_table(both: Mapping[str, Anatomy]) -> Table:
    """What several consecutive tokens leave out together, trained and random."""
    mean = unneeded(both[TRAINED])
    frame = pd.DataFrame(
        {
            "tokens": mean.index,
            "none needs": mean.sparsity.values,
            "if independent": mean.by_frequency.values,
            "and alike": mean.independent.values,
            "MLP speed-up, at most": 3 / (1 + 2 * (1 - mean.sparsity.values)),
            "none needs, random weights": unneeded(both[RANDOM]).sparsity.values,
        }
    )
    formats = {name: "{:.2f}" if "speed-up" in name else "{:.1%}" for name in frame.columns[1:]}
    return Table(frame, formats, caption="Neurons that none of several consecutive tokens needs")


def numbers(both: Mapping[str, Anatomy]) -> dict:
    """What the page says of activity and chunks, by the names under which it is glued."""
    table, chunk = means(both), unneeded(both[TRAINED]).iloc[-1]
    return {
        "anatomy_tokens_seen": f"{both[TRAINED].tokens:,}",
        "anatomy_never_told": never(both[TRAINED]),
        "anatomy_never_random": never(both[RANDOM]),
        "anatomy_tenth": table[TRAINED]["busiest_tenth"],
        "anatomy_tenth_random": table[RANDOM]["busiest_tenth"],
        "anatomy_tenth_most": 0.1 / (1 - table[TRAINED]["sparsity"]),
        "anatomy_chunk": int(chunk.name),
        "anatomy_kept": chunk.sparsity,
        "anatomy_kept_random": unneeded(both[RANDOM]).sparsity.iloc[-1],
        "anatomy_kept_bound": 3 / (1 + 2 * (1 - chunk.sparsity)),
    }


def budget_table(results: Mapping[str, dict]) -> Table:
    """What the budget allows each rule; `results` of `anatomy.budgeted_sparsity`, by name."""
    lines = []
    for name, result in results.items():
        layers = result["by_layer"]
        lines.append(
            {
                "rule": name,
                "its own target": result["sparsity"],
                "by layer": f"{min(layers):.1%} to {max(layers):.1%}" if layers else None,
                "model-level": result["realised_model_sparsity"],
                "dense perplexity": result["dense_perplexity"],
                "perplexity": result["perplexity"],
                "budget spent": (result["perplexity"] / result["dense_perplexity"] - 1) / result["budget"],
            }
        )
    formats = {"its own target": "{:.1%}", "model-level": "{:.1%}", "budget spent": "{:.0%}"}
    formats |= dict.fromkeys(("dense perplexity", "perplexity"), "{:,.2f}")
    caption = "The largest sparsity within the budget of perplexity, to two points"
    return Table(pd.DataFrame(lines), formats, caption=caption)


def box(both: Mapping[str, Anatomy], model: str, sparsity: float, some: int = 4) -> Box:
    """The chapter in a box, from the run of the page; the interval is the range of the layers."""
    tenth = both[TRAINED].by_layer().busiest_tenth
    rows = unneeded(both[TRAINED])
    count = some if some in rows.index else rows.index[-1]
    return Box(
        "Are the same neurons dropped for every token, so that a static choice would do?",
        f"No: under CATS at {sparsity:.0%} {never(both[TRAINED])}, and the busiest tenth of a layer has "
        f"{tenth.mean():.0%} of its activity (layers: {tenth.min():.0%} to {tenth.max():.0%}). "
        f"Of {count} consecutive tokens {rows.sparsity[count]:.0%} of the neurons are needed by none.",
        "fig-frequencies",
        f"Live on {model} and {both[TRAINED].tokens:,} tokens; longer text leaves fewer neurons unused.",
        "cats reproduce 12 --profile gpu",
    )

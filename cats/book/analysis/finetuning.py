"""Runs of fine-tuning as a chapter shows them: where curves begin and end, drift, and what a step costs."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cats.book.analysis import recorded
from cats.book.box import Box
from cats.book.comparison import Comparison
from cats.book.html_table import Table
from cats.book.plots.finetuning import by_layer, title
from cats.book.words import interval, listed, tidy
from cats.finetuning import Recipe
from cats.finetuning.adapt import trained_parameters
from cats.finetuning.table import costs
from cats.records import paper
from cats.records import record as records


def last(rows: pd.DataFrame) -> pd.DataFrame:
    """The last row of each method and seed."""
    return rows.groupby(["method", "seed"], sort=False).tail(1)


def trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the points of thresholds that were estimated once more."""
    return rows[~rows.method.str.contains("recalibrated")]


def run_name(slug: str) -> str:
    """What a record is called: "SmolLM2-135M" for general-smollm2-135m, "…, long" for whole-…."""
    kind, _, model = slug.partition("-")
    name = recorded.model_name(model)
    return f"{name}, long" if kind == "whole" else name


def records_of(slugs: Sequence[str]) -> dict[str, records.Record]:
    """The records `finetuning-<slug>` that there are, by slug."""
    found = {slug: recorded.find("finetuning", slug) for slug in slugs}
    return {slug: record for slug, record in found.items() if record is not None}


def gaps(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a method: before and after, nats over the dense model of the same step; low, high of after.

    Several seeds: their mean and range. One: its paired 95 % interval.
    """
    rows = trained(rows)
    ends = last(rows).groupby("method", sort=False)
    start = rows[rows.step == 0].groupby("method").heldout_nll_nats.mean()
    found = []
    for method, part in ends:
        low, high = part.delta_low, part.delta_high
        if len(part) > 1:
            low = high = part.delta_nll
        found.append(
            {
                "method": method,
                "before": start[method] - start["dense"],
                "after": part.delta_nll.mean(),
                "low": low.min(),
                "high": high.max(),
            }
        )
    return pd.DataFrame(found).set_index("method")


def found(slug: str) -> str:
    """What a run at full size ends with, as sentences: CATS at its lowest sparsity, and the other rules."""
    record = recorded.find("finetuning", slug)
    if record is None:
        return f"{slug} is not measured yet."
    rows = trained(record.rows)
    gap = gaps(rows)
    named = [next(m for m in gap.index if m.startswith("cats"))]
    named += [m for m in gap.index if m.startswith(("relu", "centred"))]
    phrases = []
    for method in named:
        before, after = gap.before[method], gap.after[method]
        verb = "shrinks" if after < before else "grows"
        phrases.append(f"that of {title(method)} {verb} from {before:+.3f} to {after:+.3f} nats")
    said = f"On {run_name(slug)}, in {rows.step.max():,} steps (the paper: 1,350), the gap to dense changes: "
    right = last(rows).groupby("method", sort=False).zero_shot_avg.mean().dropna()
    scores = [f"{title(m)} {right[m]:.1%}" for m in ["dense", *named] if m in right]
    accuracy = f" Zero-shot accuracy ends at {listed(scores)}." if scores else ""
    return tidy(f"{said}{listed(phrases)}.{accuracy}")


def box(slugs: Sequence[str]) -> Box:
    """The chapter in a box, from the first record there is."""
    there = records_of(slugs)
    if not there:
        answer = "Nothing is recorded at full size yet."
    else:
        slug, record = next(iter(there.items()))
        gap = gaps(record.rows)
        method = next(m for m in gap.index if m.startswith("cats"))
        row, relu = gap.loc[method], gap.loc["relufication"]
        seeds = last(record.rows).seed.nunique()
        spread = f"range of {seeds} seeds" if seeds > 1 else "95% interval"
        answer = (
            f"On {run_name(slug)} {title(method)} ends {row.after:+.3f} nats from a dense model that was "
            f"trained alike ({row.low:+.3f} to {row.high:+.3f}, {spread}), where it began at "
            f"{row.before:+.3f}; ReLUfication ends at {relu.after:+.3f}, from {relu.before:+.3f}. "
            "The order of Figure 2 holds: CATS begins near the dense model, ReLUfication far away."
            if relu.before > row.before and relu.after > row.after
            else f"On {run_name(slug)} the order of Figure 2 does not hold."
        )
    return Box(
        "Does general fine-tuning bring a model under CATS nearer to the dense one, at equal data?",
        answer,
        "fig-curves",
        "Models of 135M and 1.5B parameters and other text than the paper's; the dense model is trained too, "
        "so that a gap can grow while the sparse model improves.",
        "cats finetune --plan data/plans/finetuning/general.yml --device cuda",
    )


def ends_table(rows: pd.DataFrame, caption: str) -> Table:
    """Where the curves begin and end, means over seeds: loss in nats a token, the gap, what is realised."""
    rows = trained(rows)
    ends = last(rows).groupby("method", sort=False)
    starts = rows[rows.step == 0].groupby("method", sort=False)
    gap, seeds = gaps(rows), ends.seed.nunique().max()
    columns = {
        "method": [title(method) for method in ends.groups],
        "steps": ends.step.first(),
        "before": starts.heldout_nll_nats.mean(),
        "after": ends.heldout_nll_nats.mean(),
        f"after − dense [{f'{seeds} seeds' if seeds > 1 else '95%'}]": [
            None if row.Index == "dense" else interval(row.after, row.low, row.high)
            for row in gap.itertuples()
        ],
        "realised": ends.realised_sparsity.mean(),
    }
    formats = {"before": "{:.3f}", "after": "{:.3f}", "realised": "{:.1%}"}
    if rows.zero_shot_avg.notna().any():
        columns["accuracy before"] = starts.zero_shot_avg.mean()
        columns["accuracy after"] = ends.zero_shot_avg.mean()
        formats |= {"accuracy before": "{:.1%}", "accuracy after": "{:.1%}"}
    frame = pd.DataFrame({name: list(part) for name, part in columns.items()})
    return Table(frame, formats, caption=caption)


def curves(live: pd.DataFrame, slugs: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Panels of `plots.finetuning.curves`: recorded loss and accuracy, then the live run."""
    frames = {}
    for slug, record in records_of(slugs).items():
        rows, name = trained(record.rows), run_name(slug)
        frames[f"{name}, nats"] = rows.assign(value=rows.heldout_nll_nats)
        if rows.zero_shot_avg.notna().any():
            scored = rows.assign(value=rows.zero_shot_avg).dropna(subset="value")
            frames[f"{name}, accuracy"] = scored
    frames["live, nats"] = live.assign(value=live.heldout_nll_nats)
    return frames


def realised(live: pd.DataFrame, slugs: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Panels of `plots.finetuning.realised`: each record, then the live run."""
    frames = {run_name(slug): by_layer(trained(record.rows)) for slug, record in records_of(slugs).items()}
    return frames | {"live": by_layer(live)}


def drift_table(runs: Mapping[str, pd.DataFrame]) -> Table:
    """The realised sparsity before and after training, a line for each run and method; means over seeds."""
    lines = []
    for name, rows in runs.items():
        part = trained(rows[rows.sparsity.notna()])
        begin = part[part.step == 0].groupby("method").realised_sparsity.mean()
        for method, ends in last(part).groupby("method", sort=False):
            lines.append(
                {
                    "run": name,
                    "method": title(method),
                    "before": begin[method],
                    "after": ends.realised_sparsity.mean(),
                    "after, same source": ends.indomain_realised_sparsity.mean(),
                }
            )
    shares = dict.fromkeys(("before", "after", "after, same source"), "{:.1%}")
    caption = "Realised gate sparsity on held-out text, before and after training"
    return Table(pd.DataFrame(lines), shares, caption=caption)


def halves(whole: pd.DataFrame, half: pd.DataFrame) -> pd.DataFrame:
    """Rows of ReLUfication at a whole and at half a batch, told apart in the column method."""
    rows = {"whole batch": whole, "half batch": half}
    return pd.concat([part[part.method == "relufication"].assign(method=name) for name, part in rows.items()])


def halves_table(whole: str, half: str) -> Table | None:
    """Held-out loss by step at a whole and at half a batch, from two records; None where one is missing."""
    there = records_of([whole, half])
    if len(there) < 2:
        return None
    rows, other = there[whole].rows, there[half].rows
    both = halves(rows[rows.seed == other.seed.iloc[0]], other)
    wide = both.pivot_table(index="step", columns="method", values="heldout_nll_nats").reset_index()
    caption = "ReLUfication at a whole and at half a batch: held-out loss in nats"
    return Table(wide, dict.fromkeys(("whole batch", "half batch"), "{:.3f}"), caption=caption)


def comparisons() -> list[Comparison]:
    """How many parameters LoRA trains, which follows from the geometry, beside what the paper says."""
    lines, own = [], {}
    for name in ("Llama-2-7B", "Mistral-7B"):
        own[name] = trained_parameters(f"random:{name.lower()}", Recipe())
        reported = paper.reported("finetuning", model=name, quantity="trainable parameters")
        what = f"{name}: parameters that LoRA trains, million"
        key = f"tuning_{name.lower().replace('-', '_')}"
        lines.append(
            Comparison(key, what, float(reported), own[name][0] / 1e6, 0.1, "computed from the geometry", 1)
        )
    count, whole = own["Llama-2-7B"]
    reported = paper.reported("finetuning", unit="percent", evidence="N")
    what = "Llama-2-7B: their share of all parameters, percent (abstract)"
    share = Comparison(
        "tuning_share", what, float(reported), 100 * count / whole, 0.5, "computed from the geometry", 2
    )
    return [*lines, share]


def step_table(slugs: Sequence[str]) -> Table | None:
    """Seconds and memory of a training step, dense and CATS, a line a record; None without records."""
    lines = []
    for record in records_of(slugs).values():
        given = record.content["parameters"]
        runs = pd.DataFrame(costs(given["runs"]))
        dense, sparse = (runs[mask].iloc[0] for mask in (runs.method == "dense", runs.method != "dense"))
        lines.append(
            {
                "model": record.content["model"]["id"],
                "layers": "compiled" if given["compile"] else "eager",
                "dense, s": dense.step_s,
                "CATS 50%, s": sparse.step_s,
                "time × dense": sparse.time_ratio,
                "dense, GB": dense.peak_memory_gb,
                "CATS 50%, GB": sparse.peak_memory_gb,
                "memory × dense": sparse.memory_ratio,
            }
        )
    if not lines:
        return None
    frame = pd.DataFrame(lines)
    formats = {
        name: "{:.1f}" if "GB" in name else "{:.3f}" for name in frame if name.endswith((", s", ", GB"))
    }
    formats |= {name: "{:.2f}" for name in frame if "×" in name}
    return Table(frame, formats, caption="A training step of 16 sequences of 1,024 tokens, median of 60")


def turned(slug: str) -> str:
    """What a step takes where the dense model is trained last, as a clause."""
    record = recorded.find("finetuning", slug)
    if record is None:
        return f"{slug} is not measured yet"
    took = {each["method"]: each["step_s"] for each in costs(record.content["parameters"]["runs"])}
    return f"with the dense model last {listed([f'{title(m)} takes {s:.3f} s' for m, s in took.items()])}"


def gpus_table(slugs: Sequence[str]) -> Table | None:
    """Held-out nats of the first record, and the difference to it of the others; None unless all are."""
    rows = recorded.rows("finetuning", slugs)
    if not len(rows) or rows.record.nunique() < len(slugs):
        return None
    wide = rows.pivot_table(
        index=["method", "step"], columns="record", values="heldout_nll_nats", sort=False
    )[list(slugs)]
    first, *others = wide.columns
    wide[others] = wide[others].sub(wide[first], axis=0)
    wide = wide.reset_index()
    wide["method"] = wide.method.map(title)
    formats = {first: "{:.4f}"} | dict.fromkeys(others, "{:+.4f}")
    return Table(wide, formats, caption="Nats on one GPU, and the difference to them on two")

"""What brings a very sparse model back: the gap to dense of each recipe, live and from records."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cats.book.analysis import recorded
from cats.book.box import Box
from cats.book.html_table import Table
from cats.book.words import tidy
from cats.records import record as records

RULES = {  # of the recipes whose mask is not that of CATS
    "combined": "combined",
    "combined-anneal": "combined",
    "refit": "refit-combined",
    "centred": "centred",
}
RECIPES = {  # by their names in records: what figures call them, and what a plan says of them
    "lora": ("plain LoRA", {}),
    "distil": ("distillation", {"distil": 1.0}),
    "anneal": ("annealing", {"anneal": 0.5}),
    "learned": ("learned thresholds", {"learn_thresholds": True, "threshold_lr": 5e-3}),
    "sampled": ("distillation, own text", {"distil": 1.0}),
    "full": ("full, distillation", {"tuning": "full", "distil": 1.0}),
    "combined": ("thresholds per neuron", {}),
    "combined-anneal": ("per neuron, annealing", {"anneal": 0.5}),
    "refit": ("W_down fitted", {}),
    "centred": ("medians for zeros", {}),
}
PLAIN = RECIPES["lora"][0]
_FORMATS = {
    "sparsity": "{:.0%}",
    "before": "{:+.3f}",
    "after": "{:+.3f}",
    "recalibrated": "{:+.3f}",
    "realised": "{:.1%}",
    "tokens": "{:,}",
    "÷ plain LoRA's": "{:.2f}",
}


def gaps(runs: Mapping[str, records.Record], column: str = "heldout_nll_nats") -> pd.DataFrame:
    """A row for each recipe and sparsity: the gap to dense before and after, nats a token, means over seeds.

    `runs`: recipe -> record, that of plain LoRA among them, which holds the dense model too. *recalibrated*
    is the gap with thresholds estimated once more, None where a run did not.
    """
    base = runs["lora"].rows
    base = base[base.method == "dense"].groupby("step")[column].mean()
    found = []
    for name, record in runs.items():
        rows = record.rows[record.rows.method.str.startswith(RULES.get(name, "cats"))]
        again = rows.method.str.contains("recalibrated")
        for level, part in rows[~again].groupby("sparsity"):
            ends = part[part.step == part.step.max()]
            dense = base[ends.step.iloc[0]]
            other = rows[again & (rows.sparsity == level)]
            found.append(
                {
                    "recipe": RECIPES[name][0],
                    "sparsity": level,
                    "before": part[part.step == 0][column].mean() - base[0],
                    "after": ends[column].mean() - dense,
                    "recalibrated": other[column].mean() - dense if len(other) else None,
                    "realised": ends.realised_sparsity.mean(),
                    "tokens": int(ends.rows_trained.iloc[0])
                    * record.content["parameters"]["sequence_length"],
                    "seeds": ends.seed.nunique(),
                }
            )
    frame = pd.DataFrame(found)
    plain = frame[frame.recipe == PLAIN].set_index("sparsity").after
    return frame.assign(of_plain=frame.after / frame.sparsity.map(plain))


def records_of(model: str) -> dict[str, records.Record]:
    """The records of a model's recipes; none where plain LoRA is not among them."""
    found = {name: recorded.find("finetuning", f"recovery-{name}-{model}") for name in RECIPES}
    found = {name: record for name, record in found.items() if record is not None}
    return found if "lora" in found else {}


def slugs(runs: Mapping[str, Mapping]) -> list[str]:
    """The names of the records of `runs`: model -> recipe -> record."""
    return [f"recovery-{name}-{model}" for model, records_of in runs.items() for name in records_of]


def found(model: str, rows: pd.DataFrame) -> str:
    """What the recipes leave at full size, as sentences; `rows` of `gaps`."""
    said = [f"{recorded.model_name(model)}, {rows.tokens.iloc[0] / 1e6:.1f} million tokens."]
    for level, part in rows.groupby("sparsity"):
        plain = part[part.recipe == PLAIN].iloc[0]
        least = part.sort_values("after").iloc[0]
        other = (
            f", {least.recipe} from {least.before:+.3f} to {least.after:+.3f}"
            if least.after < plain.after
            else ", and no other recipe leaves less"
        )
        said.append(
            f"At {level:.0%} plain LoRA takes the gap from {plain.before:+.3f} to {plain.after:+.3f}{other}."
        )
    return tidy(" ".join(said))


def box(full: Mapping[str, pd.DataFrame]) -> Box:
    """The chapter in a box: the first model at the highest sparsity that all of it was trained at."""
    answer = "Nothing is recorded at full size yet."
    if full:
        model, rows = next(iter(full.items()))
        level = rows.sparsity.min()
        part = rows[rows.sparsity == level].sort_values("after")
        best, plain = part.iloc[0], part[part.recipe == PLAIN].iloc[0]
        seeds = int(part.seeds.max())
        answer = (
            f"On {recorded.model_name(model)} at {level:.0%} gate sparsity plain LoRA takes the gap to dense "
            f"from {plain.before:+.3f} to {plain.after:+.3f} nats; {best.recipe} leaves least, "
            f"{best.after:+.3f}, which is {best.of_plain:.0%} of it. No interval is given: each recipe has "
            f"{seeds} seed{'s' if seeds > 1 else ''}."
        )
    return Box(
        "What brings a model back that was made sparser than 50%?",
        answer,
        "fig-recovery",
        "Few seeds: recipes whose gaps differ by a hundredth of a nat are not told apart.",
        "cats finetune --plan data/plans/finetuning/recovery.yml --device cuda",
    )


def table(rows: pd.DataFrame, caption: str) -> Table:
    """The columns of `gaps` that hold something."""
    frame = rows.drop(columns="seeds").rename(columns={"of_plain": "÷ plain LoRA's"})
    frame = frame.dropna(axis="columns", how="all")
    return Table(frame, {k: form for k, form in _FORMATS.items() if k in frame}, caption=caption)


def at_papers_rate(full: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for each model and sparsity: what plain LoRA leaves at the paper's rate, at the rate of these
    recipes, and the recipe that leaves least. Empty where no record has the paper's rate.
    """
    lines = []
    for name, rows in full.items():
        record = recorded.find("finetuning", f"general-{name}")
        if record is None:
            continue
        both = gaps({"lora": record}).merge(rows[rows.recipe == PLAIN], on="sparsity", suffixes=("_slow", ""))
        for row in both.itertuples():
            least = rows[rows.sparsity == row.sparsity].sort_values("after").iloc[0]
            lines.append(
                {
                    "model": recorded.model_name(name),
                    "sparsity": row.sparsity,
                    "plain LoRA, paper's rate": row.after_slow,
                    "plain LoRA": row.after,
                    "best recipe": least.recipe,
                    "its gap": least.after,
                    "÷ first gap": least.after / row.after_slow,
                }
            )
    return pd.DataFrame(lines)


def rates_table(rows: pd.DataFrame) -> Table | None:
    """Rows of `at_papers_rate`; None where there are none."""
    if not len(rows):
        return None
    formats = {name: "{:+.3f}" for name in rows if "LoRA" in name or name == "its gap"}
    formats |= {"sparsity": "{:.0%}", "÷ first gap": "{:.2f}"}
    return Table(rows, formats, caption="The gap in nats at the paper's rate, and what is left at best")


def medians(models: Sequence[str]) -> str:
    """Where `centred` ends at the paper's rate, as sentences."""
    said = []
    for name in models:
        record = recorded.find("finetuning", f"general-{name}")
        rows = pd.DataFrame() if record is None else record.rows
        if len(rows):
            ends = rows[(rows.step == rows.step.max()) & rows.method.str.startswith("centred")]
            said += [
                f"At the paper's rate medians end {row.delta_nll:+.3f} nats from dense on "
                f"{recorded.model_name(name)} at {row.sparsity:.0%}."
                for row in ends.itertuples()
            ]
    return tidy(" ".join(said) or "Medians are not measured at the paper's rate.")


def learned_layers(runs: Mapping[str, Mapping[str, records.Record]], sparsity: float) -> dict[str, list]:
    """The sparsity by layer after training with learned thresholds, by the name of a line."""
    return {
        f"learned, {recorded.model_name(name)}": run["sparsity_by_layer"]
        for name, records_of in runs.items()
        if "learned" in records_of
        for run in records_of["learned"].content["parameters"]["runs"]
        if run["method"] == f"cats {sparsity:g}"
    }

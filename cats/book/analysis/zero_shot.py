"""Accuracy on the paper's tasks: what is kept of the dense average, live and from records."""

from collections.abc import Sequence

import pandas as pd

from cats.book.analysis import recorded
from cats.book.box import Box
from cats.book.comparison import Comparison
from cats.book.html_table import Table
from cats.book.words import interval, listed
from cats.core.accounting import account
from cats.evaluation.table import AVERAGE
from cats.models import load as models
from cats.records import paper

_COLUMNS = ("series", "gate_sparsity", "model_sparsity", "share", "low", "high", "reported")
# model, method, gate sparsity and tolerance of the comparison with the paper
_PAPER = (
    ("Llama-2-7B", "dense", 0.0, 0.003),
    ("Llama-2-7B", "CATS", 0.5, 0.003),
    ("Mistral-7B", "dense", 0.0, 0.003),
    ("Mistral-7B", "CATS", 0.5, 0.003),
    ("Llama-2-13B", "dense", 0.0, 0.003),
    ("Llama-2-13B", "CATS", 0.7, 0.003),
    ("Llama-2-7B-chat", "dense", 0.0, 0.005),
    ("Llama-2-7B-chat", "CATS", 0.5, 0.005),
)


def averages(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the mean over the paper's eight tasks; empty where nothing is recorded."""
    return results[results.task == AVERAGE] if len(results) else results


def half(results: pd.DataFrame) -> pd.DataFrame:
    """CATS at 50 % on the mean of the eight tasks, a row each record, with share, low and high of dense."""
    rows = averages(results)
    if not len(rows):
        return rows
    rows = rows[(rows.rule == "cats") & (rows.gate_sparsity == 0.5)]
    base = rows.acc - rows.delta_acc
    return rows.assign(
        share=rows.acc / base, low=1 + rows.delta_low / base, high=1 + rows.delta_high / base
    ).astype({"share": float, "low": float, "high": float})


def kept(results: pd.DataFrame) -> str:
    """What CATS at 50 % keeps of the dense average, by record, as words of a table."""
    shares = [f"{row.record} {row.share:.1%}" for row in half(results).itertuples()]
    return f"kept of the dense average at 50%: {', '.join(shares)}" if shares else "not measured on full sets"


def box(results: pd.DataFrame) -> Box:
    """The chapter in a box, with the interval of each model."""
    phrases = [
        f"{recorded.model_name(row.record)} {row.share:.1%} ({row.low:.1%} to {row.high:.1%})"
        for row in half(results).itertuples()
    ]
    answer = "No full test set is recorded."
    if phrases:
        answer = (
            f"At 50% gate sparsity, without training, the mean accuracy over the paper's eight tasks is this "
            f"share of the dense model's, with its 95% interval: {listed(phrases)}. The paper's values for "
            f"Llama-2-7B are {_reported('CATS', 0.5) / _reported('dense', 0.0):.1%}."
        )
    return Box(
        "How much of its zero-shot accuracy does a model keep under CATS?",
        answer,
        "fig-kept",
        "Smaller models than the paper's, read back from 4 bits; multiple choice reads a prompt and writes "
        "nothing, so it can hold where generation breaks.",
        "cats reproduce 04 --profile llama-2-7b",
    )


def live_table(answers: pd.DataFrame) -> Table:
    """Each task and method of this page: accuracy, its paired difference to dense, and what was realised."""
    frame = pd.DataFrame(
        {
            "method": answers.label,
            "task": answers.task,
            "acc ± se": [f"{row.acc:.3f} ± {row.acc_se:.3f}" for row in answers.itertuples()],
            "acc − dense [95%]": [
                None if pd.isna(row.delta_acc) else interval(row.delta_acc, row.delta_low, row.delta_high)
                for row in answers.itertuples()
            ],
            "realised": answers.realised_sparsity,
            "model-level": answers.realised_model_sparsity,
            "McNemar p": answers.mcnemar_p,
        }
    )
    formats = {"realised": "{:.1%}", "model-level": "{:.1%}", "McNemar p": "{:.3f}"}
    return Table(frame, formats, caption="Live: the same questions, dense and sparse")


def forest(results: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Rows of `plots.zero_shot.forest`: CATS and centred of the first record by task, then the live ones."""
    parts = []
    if len(results):
        rows = results[(results.record == results.record.iloc[0]) & (results.task != AVERAGE)]
        parts.append(rows[rows.rule.isin(["cats", "centred"]) & rows.gate_sparsity.isin([0.5, 0.7])])
    parts.append(answers.assign(task=answers.task + " (live)"))
    rows = pd.concat(parts)
    return rows[rows.rule != "dense"]


def points(results: pd.DataFrame) -> pd.DataFrame:
    """Shares of the dense average for `plots.zero_shot.kept`: the paper's first, then those of records."""
    table = paper.table("zero_shot")
    table = table[(table.quantity == "mean accuracy") & table.gate_sparsity.notna()]
    rows = []
    for name, part in table.groupby("model", sort=False):
        shape = account(models.config(f"random:{name.lower().removesuffix('-chat')}"))
        base = part[part.method == "dense"].value.iloc[0]
        for row in part[part.method == "CATS"].itertuples():
            level, share = row.gate_sparsity, row.value / base
            rows.append((f"{name}, paper", level, shape.model_sparsity(level), share, None, None, True))
    for row in averages(results).itertuples():
        if row.rule in ("cats", "centred"):
            base, name = row.acc - row.delta_acc, f"{recorded.model_name(row.record)}, {row.method}"
            shares = row.acc / base, 1 + row.delta_low / base, 1 + row.delta_high / base
            rows.append((name, row.gate_sparsity, row.model_sparsity, *shares, False))
    return pd.DataFrame(rows, columns=_COLUMNS).astype({"low": float, "high": float})


def full_table(part: pd.DataFrame) -> Table:
    """Accuracies in per cent of one record, a line each method, the average first."""
    wide = part.pivot_table(index="label", columns="task", values="acc", sort=False)
    wide.insert(0, AVERAGE, wide.pop(AVERAGE))
    wide = wide.mul(100).rename(columns=lambda name: name.replace("_", " "))
    wide = wide.reset_index(names="method")
    caption = f"{recorded.model_name(part.record.iloc[0])}: accuracy in per cent, full test sets"
    return Table(wide, dict.fromkeys(wide.columns[1:], "{:.1f}"), caption=recorded.quality(caption, part))


def cards(results: pd.DataFrame) -> Table | None:
    """Dense scores beside those that the models' makers print; None where nothing is recorded."""
    lines = []
    for card in paper.table("model_cards").itertuples() if len(results) else ():
        dense = results[(results.record == card.model) & (results.rule == "dense")]
        for row in dense[dense.task.str.startswith(card.task)].to_dict("records"):
            score, error = row[card.quantity], row[f"{card.quantity}_se"]
            lines.append(
                {
                    "model": recorded.model_name(card.model),
                    "task": row["task"].replace("_", " "),
                    "metric": card.quantity,
                    "printed": card.value,
                    "here ± se": f"{score:.3f} ± {error:.3f}",
                    "in se": (score - card.value) / error,
                }
            )
    formats = {"printed": "{:.3f}", "in se": "{:+.1f}"}
    caption = "Dense scores here and in model cards, and their difference over the standard error"
    return Table(pd.DataFrame(lines), formats, caption=caption) if lines else None


def again_table(rows: pd.DataFrame) -> Table:
    """Rows of `variants.again`: one run on one GPU and on two."""
    names = {"gate_sparsity": "gate sparsity", "acc": "accuracy on one GPU", "acc_again": "on two"}
    formats = {"gate sparsity": "{:.0%}", "answers": "{:,}"}
    formats |= {"accuracy on one GPU": "{:.2%}", "on two": "{:.2%}"}
    return Table(rows.rename(columns=names), formats, caption="The same evaluation on one GPU and on two")


def speeds(slugs: Sequence[str]) -> Table | None:
    """Tokens/s of an evaluation by model and task, masked over dense; None where nothing is recorded."""
    rows = recorded.rows("zero_shot", slugs)
    if not len(rows):
        return None
    rows = rows[rows.task != AVERAGE]
    name = rows.record.str.removeprefix("throughput-").str.removesuffix("-again")
    rows = rows.assign(label=rows.apply(recorded.label, axis=1), model=name.map(recorded.model_name))
    wide = rows.pivot_table(index=["model", "task"], columns="label", values="tokens_per_s", sort=False)
    masked = [name for name in wide if name != "dense"]
    wide[masked] = wide[masked].div(wide["dense"], axis=0)
    formats = {"dense": "{:,.0f}"} | dict.fromkeys(masked, "{:.2f}")
    caption = "Tokens a second of an evaluation: dense, and those under a mask over dense"
    return Table(wide.reset_index(), formats, caption=caption)


def comparisons(mean: pd.DataFrame, model: dict, setting: str) -> list[Comparison]:
    """The paper's averages; judged where `model` is the paper's and `mean` has the rows of its average."""
    here, found = paper.MODELS.get(model["id"]), []
    for name, method, level, tolerance in _PAPER:
        keys = {"model": name, "method": method, "gate_sparsity": level, "quantity": "mean accuracy"}
        same = mean[(mean.rule == method.lower()) & (mean.gate_sparsity == level)]
        key = f"{name}_{method}_{100 * level:.0f}".lower().replace("-", "_")
        found.append(
            Comparison(
                f"zero_shot_{key}",
                f"{name}, {method}{f' {level:.0%}' if level else ''}: 8 tasks",
                float(paper.reported("zero_shot", **keys)),
                float(same.acc.iloc[0]) if here == name and len(same) else None,
                tolerance,
                setting,
                digits=4,
            )
        )
    return found


def _reported(method: str, sparsity: float, model: str = "Llama-2-7B") -> float:
    keys = {"model": model, "method": method, "gate_sparsity": sparsity, "quantity": "mean accuracy"}
    return float(paper.reported("zero_shot", **keys))

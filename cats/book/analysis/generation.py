"""Recorded answers to GSM8K: what is kept of the dense model's, what the prompt costs, and what breaks."""

import re
from collections.abc import Iterator

import pandas as pd

from cats.book.analysis import recorded
from cats.book.box import Box
from cats.book.comparison import Comparison
from cats.book.html_table import Table
from cats.book.words import listed, tidy
from cats.evaluation.intervals import as_text, difference
from cats.records import paper
from cats.records.packing import unpack

EVERYWHERE, DECODE_ONLY = "all tokens", "decode only"
_MASKED = {EVERYWHERE: "all tokens masked", DECODE_ONLY: "the answer alone masked"}
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # of the worked examples: <<6*3=18>>, for a calculator
_TOLERANCE = 1.8  # percentage points: two standard errors of 12 % over 1,319 problems


def where(row) -> str:
    """Which tokens of a recorded row were masked, in the words of the figures."""
    policy = row["policy"]
    return DECODE_ONLY if isinstance(policy, dict) and policy.get("prefill") == "dense" else EVERYWHERE


def box(rows: pd.DataFrame) -> Box:
    """The chapter in a box: CATS at 50 % on GSM8K, the prompt masked and not; rows of `generation`."""
    parts, dense = [], None
    for _, row in _compared(rows):
        if row.rule == "cats" and row.gate_sparsity == 0.5:
            dense = row.exact_match - row.delta
            change = interval(row.delta, row.delta_low, row.delta_high)
            parts.append(f"{change} points with {_MASKED[where(row)]}")
    answer = "No run on these problems is recorded."
    if parts:
        base, half = (_reported(method, level) for method, level in (("dense", 0.0), ("CATS", 0.5)))
        answer = (
            f"At 50% gate sparsity, without training, {recorded.spelled(rows.model.iloc[0])}, which solves "
            f"{dense:.1%} of GSM8K dense, changes by {listed(parts)}, with 95% intervals. The rebuttal's "
            f"Llama-2-7B goes from {base:.2f} to {half:.2f}%."
        )
    return Box(
        "Does a sparse model still reach answers that take many steps to write?",
        answer,
        "fig-maths",
        "One model of 1.5B, read back from 4 bits and tuned for code; one task, greedy text, five examples.",
        "cats evaluate --plan data/plans/three-models.yml --data-dir MIRRORS --output runs",
    )


def solved_table(rows: pd.DataFrame) -> Table | None:
    """`table` as a page shows it; None where nothing is recorded."""
    if not len(rows):
        return None
    caption = f"GSM8K on {recorded.spelled(rows.model.iloc[0])}, {rows.documents.iloc[0]:,} problems"
    formats = dict.fromkeys(("realised, prompt", "realised, decode"), "{:.1%}")
    return Table(table(rows), formats, caption=recorded.quality(caption, rows))


def broken_table(rows: pd.DataFrame) -> Table | None:
    """`broken` as a page shows it; None where no texts are recorded."""
    frame = broken(rows)
    caption = "Problems that only the dense model solves, and the beginnings of the answers"
    return Table(frame, caption=recorded.quality(caption, rows)) if len(frame) else None


def comparisons(rows: pd.DataFrame, slug: str) -> list[Comparison]:
    """The rebuttal's scores in per cent beside those of the record `slug`, of whatever model that is."""
    found = []
    for method, level in (("dense", 0.0), ("CATS", 0.5), ("CATS", 0.7)):
        same = rows
        if len(rows):
            kept = (rows.record == slug) & (rows.rule == method.lower()) & (rows.gate_sparsity == level)
            same = rows[kept]
        own = same.iloc[0] if len(same) else None
        other = own is not None and paper.MODELS.get(own.model) != "Llama-2-7B"
        found.append(
            Comparison(
                f"generation_{method.lower()}_{100 * level:.0f}",
                f"Llama-2-7B, {method}{f' {level:.0%}' * (level > 0)}: GSM8K, %",
                _reported(method, level),
                None if own is None else 100 * own.exact_match,
                _TOLERANCE,
                "" if own is None else f"{own.model}, record",
                digits=2,
                differs="other model" if other else "",
            )
        )
    return found


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the experiment `generation` as a page shows them, a line each; dense once for each model.

    Solved is the share of problems with an exact match and its standard error; gained and lost are problems
    that only the sparse, and only the dense model solves.
    """
    rows = rows[(rows.rule != "dense") | ~rows.duplicated(["model", "task", "rule", "exact_match"])]
    return pd.DataFrame(
        [
            {
                "": recorded.label(row),
                "masked": None if row.rule == "dense" else where(row),
                "solved, %": f"{100 * row.exact_match:.1f} ± {100 * row.exact_match_se:.1f}",
                "− dense [95 %]": interval(row.delta, row.delta_low, row.delta_high),
                "gained, lost": None if pd.isna(row.delta) else f"{row.gained:.0f}, {row.lost:.0f}",
                "realised, prompt": row.get("realised_prefill"),
                "realised, decode": row.get("realised_decode"),
            }
            for _, row in rows.iterrows()
        ]
    )


def interval(delta: float | None, low: float, high: float) -> str | None:
    """A difference of shares in percentage points, "−9.1 [−11.0, −7.2]"; None where there is none."""
    if delta is None or pd.isna(delta):
        return None
    return as_text(delta, low, high, "+.1f", scale=100)


def kept(rows: pd.DataFrame) -> pd.DataFrame:
    """Exact match as a share of the dense model's, for `cats.plots.generation.over_sparsity`.

    First the values of the paper's rebuttal; then recorded rules with a gate sparsity, each a series with
    its tokens masked. Models that solve nothing dense have no share and are left out.
    """
    reported = paper.table("generation")
    reported = reported[reported.gate_sparsity.notna()]
    points = []
    for name, part in reported.groupby("model", sort=False):
        base = part[part.method == "dense"].value.iloc[0]
        points += [
            {
                "series": f"{name}, paper",
                "gate_sparsity": row.gate_sparsity,
                "value": row.value / base,
                "low": None,
                "high": None,
                "reported": True,
            }
            for row in part[part.method == "CATS"].itertuples()
        ]
    for _, row in _compared(rows):
        base = row.exact_match - row.delta
        if base > 0:
            points.append(
                {
                    "series": f"{row.method}, {where(row)}",
                    "gate_sparsity": row.gate_sparsity,
                    "value": row.exact_match / base,
                    "low": 1 + row.delta_low / base,
                    "high": 1 + row.delta_high / base,
                    "reported": False,
                }
            )
    return pd.DataFrame(points).astype({"low": float, "high": float})


def words(rows: pd.DataFrame) -> str:
    """What CATS keeps with all tokens masked, beside the rebuttal at the same sparsity, as a sentence."""
    points = kept(rows)
    reported = points[points.reported].set_index("gate_sparsity")
    phrases = []
    for _, row in _compared(rows):
        if row.rule == "cats" and where(row) == EVERYWHERE and row.exact_match - row.delta > 0:
            own = f"{row.exact_match / (row.exact_match - row.delta):.0%}"
            level = row.gate_sparsity
            beside = ""
            if level in reported.index:
                name = reported.series[level].removesuffix(", paper")
                beside = f" (the rebuttal's {name} {reported.value[level]:.0%})"
            phrases.append(f"{own} at {level:.0%} gate sparsity{beside}")
    if not phrases:
        return "No run of CATS on these problems is recorded yet."
    return tidy(
        f"With all tokens masked, {recorded.spelled(rows.model.iloc[0])} keeps of its dense score "
        f"{listed(phrases)}."
    )


def prompt_costs(rows: pd.DataFrame) -> pd.DataFrame:
    """What masking the prompt too costs over masking the answer alone, on the same problems.

    A line for each rule and sparsity recorded both ways: label, everywhere and decode_only (exact match),
    and delta, low, high, everywhere minus decode only with a 95 % paired interval.
    """
    ways: dict[tuple, dict] = {}
    for _, row in _compared(rows):
        key = (row.model, row.task, row.documents, row.rule, row.gate_sparsity)
        ways.setdefault(key, {})[where(row)] = row
    found = []
    for both in ways.values():
        if len(both) == 2:
            masked, alone = both[EVERYWHERE], both[DECODE_ONLY]
            compared = difference(unpack(alone.correct), unpack(masked.correct))
            found.append(
                {
                    "label": recorded.label(masked),
                    "everywhere": masked.exact_match,
                    "decode_only": alone.exact_match,
                    **{name: compared[name] for name in ("delta", "low", "high")},
                }
            )
    return pd.DataFrame(found)


def prompt_words(rows: pd.DataFrame) -> str:
    """`prompt_costs` as a sentence."""
    parts = [
        f"{row.label} solves {row.everywhere:.1%} with all tokens masked and {row.decode_only:.1%} with the "
        f"answer alone masked, a difference of {interval(row.delta, row.low, row.high)} points"
        for row in prompt_costs(rows).itertuples()
    ]
    if not parts:
        return "No run with the answer alone masked is recorded beside one with everything masked."
    return tidy(f"{'; '.join(parts)}.")


def broken(rows: pd.DataFrame, problems: int = 3) -> pd.DataFrame:
    """Problems that only the dense model solves, at most `problems` of them: a line for each text.

    Columns "" (whose text) and "text": the question, the dense answer, and that of each CATS row with all
    tokens masked which fails there and kept its text. Notes for a calculator, which the worked examples of
    GSM8K teach, are left out. Empty where the rows keep no texts.
    """
    found: dict[int, dict[str, str]] = {}
    for _, row in _compared(rows):
        examples = row.get("examples")
        if row.rule != "cats" or where(row) != EVERYWHERE or not isinstance(examples, list):
            continue
        for example in examples:
            question = example["question"].removeprefix("Question:").removesuffix("Answer:")
            texts = {"question": question, "dense": example["dense"]}
            found.setdefault(example["document"], texts)[recorded.label(row)] = example["sparse"]
    chosen = sorted(found.values(), key=len, reverse=True)[:problems]  # where most sparsities fail, first
    lines = [
        {"": name, "text": _ANNOTATION.sub("", text).strip()}
        for texts in chosen
        for name, text in texts.items()
    ]
    return pd.DataFrame(lines, columns=["", "text"])


def _compared(rows: pd.DataFrame) -> Iterator[tuple]:
    """Rows with a gate sparsity and a difference to dense."""
    if len(rows):
        yield from rows[rows.gate_sparsity.gt(0) & rows.delta.notna()].iterrows()


def _reported(method: str, level: float) -> float:
    return float(paper.reported("generation", model="Llama-2-7B", method=method, gate_sparsity=level))

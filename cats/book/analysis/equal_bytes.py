"""Rules on the same questions at the same bytes read: each beside dense, and beside the best of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cats import criteria
from cats.book.analysis import recorded, rivals
from cats.book.html_table import Table
from cats.book.words import interval, tidy
from cats.criteria.centred import Centred
from cats.errors import CatsError
from cats.evaluation.intervals import at_equal_bytes, mean_difference, share_above_chance
from cats.evaluation.table import AVERAGE
from cats.evaluation.task_list import PAPER, TASKS, stock
from cats.models import load as models
from cats.records.packing import unpack

_REACHED = 0.9  # of the target: a rule that reads its prompt dense does without less
_LEVEL = 0.95
_CHANCE = float(np.mean([TASKS[name].chance for name in PAPER]))


@dataclass(frozen=True)
class Comparison:
    """Rules of one model at one target. `lines`: a row each, best first, then those that read more.

    Columns: rule, realised (share of the target's weights that the questions did without, at the target),
    target_megabytes, documents, prompt, accuracy, share (of dense above chance), and two paired differences:
    delta, low, high to dense and behind, behind_low, behind_high to the best. `megabytes`: what a token reads
    where accuracies are compared. `level`: of the intervals to the best.
    """

    model: str
    target: float
    megabytes: float
    level: float
    lines: pd.DataFrame

    @property
    def tied(self) -> list[str]:
        """Rules whose interval to the best holds 0."""
        rest = self.lines[self.lines.behind_high.notna()]
        return list(rest[rest.behind_high.astype(float) >= 0].rule)


def compare(rows: pd.DataFrame, rules: Sequence[str], target: float, *, by: str) -> Comparison | None:
    """`rules` at the bytes of the one that reads most at `target`; None for fewer than two.

    `rows`: the zero_shot record of one model, `by` the column of the target, "gate_sparsity" or
    "model_sparsity". Answers to each question are interpolated between the measured points of a rule, dense
    included, so that intervals stay paired. The best was chosen by looking at all k rules: intervals to it
    have Bonferroni's level for k - 1 comparisons. Raises CatsError without the dense model's answers.
    """
    mean = rows[rows.task == AVERAGE]
    if not len(mean):
        return None
    mean = mean.assign(megabytes=rivals.read_bytes(mean) / 1e6)
    at = mean[mean.rule.isin(list(rules)) & (mean[by].astype(float).round(4) == target)]
    reached = at[at.realised_model_sparsity > _REACHED * at.model_sparsity]
    if len(reached) < 2:
        return None
    wanted = float(reached.megabytes.max())
    dense = _answers(rows[rows.rule == criteria.DENSE])
    if dense is None:
        raise CatsError("The record lacks the dense model's answers: evaluate all eight tasks.")
    blends = {rule: _blend(rows, mean, rule, wanted) for rule in at.rule}
    blends = {rule: answers for rule, answers in blends.items() if answers is not None}
    scores = {rule: float(np.mean([each.mean() for each in answers])) for rule, answers in blends.items()}
    base, best = float(np.mean([each.mean() for each in dense])), max(scores, key=scores.get)
    raised = 1 - (1 - _LEVEL) / (len(scores) - 1)
    lines = []
    for row in at.itertuples():
        policy = row.policy if isinstance(row.policy, dict) else {}
        line = {
            "rule": row.rule,
            "realised": row.realised_model_sparsity / row.model_sparsity,
            "target_megabytes": row.megabytes,
            "documents": row.documents,
            "prompt": policy.get("prefill", "masked") if row.rule != "griffin" else "dense",
        }
        if row.rule in blends:
            answers = blends[row.rule]
            line |= {"accuracy": scores[row.rule]}
            line |= {"share": share_above_chance(scores[row.rule], base, _CHANCE)}
            line |= _paired(dense, answers, _LEVEL, "delta", "low", "high")
            if row.rule != best:
                line |= _paired(blends[best], answers, raised, "behind", "behind_low", "behind_high")
        lines.append(line)
    columns = ["accuracy", "share", "delta", "low", "high", "behind", "behind_low", "behind_high"]
    frame = pd.DataFrame(lines)
    frame = frame.reindex(columns=[*dict.fromkeys([*frame.columns, *columns])])
    frame = frame.sort_values("accuracy", ascending=False, ignore_index=True)
    return Comparison(rows.model.iloc[0], target, wanted, raised, frame)


def table(found: Comparison, rows: pd.DataFrame) -> Table:
    """A comparison as a page shows it; `rows`: those it was made from."""
    lines = found.lines
    behind = [
        None if pd.isna(row.behind) else _points(row.behind, row.behind_low, row.behind_high)
        for row in lines.itertuples()
    ]
    frame = pd.DataFrame(
        {
            "rule": lines.rule,
            "accuracy": lines.accuracy,
            "− dense, points [95%]": [
                None if pd.isna(row.delta) else _points(row.delta, row.low, row.high)
                for row in lines.itertuples()
            ],
            "of dense above chance": lines.share,
            f"− best, points [{found.level:.1%}]": [
                f"{text}, tie" if rule in found.tied else text
                for rule, text in zip(lines.rule, behind, strict=True)
            ],
            "of the target, realised": lines.realised,
            "prompt": lines.prompt,
            "extra memory, of the MLP": [extra_memory(found.model, rule) for rule in lines.rule],
        }
    )
    shares = ("of dense above chance", "of the target, realised", "extra memory, of the MLP")
    formats = {"accuracy": "{:.2%}"} | dict.fromkeys(shares, "{:.1%}")
    caption = (
        f"{recorded.spelled(found.model)}, target {found.target:.0%}: mean accuracy of eight tasks "
        f"({lines.documents.iloc[0]:,} questions) where every rule reads {found.megabytes:,.0f} MB a token, "
        "interpolated between its measured points; a dash where a rule reads more or its answers are lost"
    )
    return Table(frame, formats, caption=recorded.quality(caption, rows))


def words(found: Comparison) -> str:
    """Which rule keeps most, what it keeps, and whether the second is a tie, as a sentence."""
    first, second = found.lines.iloc[0], found.lines.iloc[1]
    gap = _points(-second.behind, -second.behind_high, -second.behind_low)
    name = recorded.spelled(found.model)
    verdict = "a tie" if second.rule in found.tied else "not a tie"
    return tidy(
        f"On {name} at {found.megabytes:,.0f} MB a token (target {found.target:.0%}), "
        f"`{first.rule}` keeps most, {first.share:.1%} of what dense has above chance; it leads "
        f"`{second.rule}` by {gap} points, {verdict}."
    )


def losses(rows: pd.DataFrame, rules: Sequence[str], *, by: str = "gate_sparsity") -> pd.DataFrame:
    """Rise of the loss over dense at equal bytes, in nats: a row each rule, a column each text and target.

    `rows`: the perplexity record of one model; bytes as in `compare`. Intervals to a second rule would need
    the losses of each document, which these records do not keep.
    """
    found: dict[str, dict] = {}
    for corpus, text in rows.groupby("corpus", sort=False):
        text = text.assign(megabytes=rivals.read_bytes(text) / 1e6)
        sparse = text[text.rule.isin(list(rules))]
        for target, part in sparse.groupby(by):
            wanted = float(part.megabytes.max())
            for rule in part.rule:
                curve = text[text.rule.isin([rule, criteria.DENSE])]
                rise = at_equal_bytes(curve.megabytes, curve.delta_nll.fillna(0.0), wanted)
                found.setdefault(rule, {"rule": rule})[f"{corpus}, {target:.0%}"] = rise
    return pd.DataFrame(list(found.values()))


def extra_memory(model: str, rule: str) -> float | None:
    """Weights that a rule adds to an MLP, over its own: A of `centred` is d × d; None for other rules."""
    if not isinstance(criteria.rule(rule), Centred):
        return None
    config = models.config(f"random:{model}")
    return config.hidden_size / (3 * config.intermediate_size)


def _answers(rows: pd.DataFrame) -> list[np.ndarray] | None:
    """Scores of each question, an array for each of the paper's tasks; None where one has no scores kept."""
    tasks = rows.assign(name=rows.task.map(stock)).set_index("name").correct.dropna()
    return [unpack(tasks[name]) for name in PAPER] if set(PAPER) <= set(tasks.index) else None


def _blend(rows: pd.DataFrame, mean: pd.DataFrame, rule: str, wanted: float) -> list[np.ndarray] | None:
    """Scores of each question at `wanted` MB, between the measured points of a rule; None outside them, and
    where scores were not kept."""
    points = mean[mean.rule.isin([rule, criteria.DENSE])]
    shares = [at_equal_bytes(points.megabytes, unit, wanted) for unit in np.eye(len(points))]
    if None in shares:
        return None
    parts = []
    for share, name, level in zip(shares, points.rule, points.model_sparsity, strict=True):
        if share:
            answers = _answers(rows[(rows.rule == name) & (rows.model_sparsity == level)])
            if answers is None:
                return None
            parts.append([share * each for each in answers])
    return [np.sum(each, axis=0) for each in zip(*parts, strict=True)]


def _paired(baseline: list, other: list, level: float, *names: str) -> dict:
    found = mean_difference(list(zip(baseline, other, strict=True)), level=level)
    return dict(zip(names, (found["delta"], found["low"], found["high"]), strict=True))


def _points(delta: float, low: float, high: float) -> str:
    return interval(delta, low, high, digits=2, scale=100)

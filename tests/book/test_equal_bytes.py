"""Rules at the same bytes: answers between measured points, ties, and what no rule reaches."""

import numpy as np
import pandas as pd
import pytest

from cats.book.analysis import equal_bytes
from cats.errors import CatsError
from cats.evaluation.table import AVERAGE
from cats.evaluation.task_list import PAPER
from cats.records.packing import pack

QUESTIONS = 40
# rule, target and realised model-level sparsity, and how many of each task's questions are right
POINTS = (
    ("dense", 0.0, 0.0, 36),
    ("cats", 0.25, 0.24, 24),
    ("centred", 0.25, 0.30, 33),
    ("chess", 0.25, 0.24, 33),
    ("griffin", 0.25, 0.06, 35),
)


def record(points=POINTS) -> pd.DataFrame:
    rows = []
    for rule, target, realised, right in points:
        common = {
            **{"model": "qwen2.5-coder-1.5b-instruct", "rule": rule, "gate_sparsity": 2 * target},
            **{"model_sparsity": target, "realised_model_sparsity": realised, "policy": None},
            **{"bytes_per_token": 1e9 * (1 - target), "read_from": "Q4_K_M GGUF", "documents": QUESTIONS},
        }
        correct = pack(np.arange(QUESTIONS) < right)
        names = {"sciq": "sciq_closed_book"}
        rows += [{**common, "task": names.get(task, task), "correct": correct} for task in PAPER]
        rows.append({**common, "task": AVERAGE, "correct": None})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def found():
    return equal_bytes.compare(record(), [point[0] for point in POINTS[1:]], 0.5, by="gate_sparsity")


def test_answers_are_read_between_the_measured_points(found):
    """CATS reads most, 760 MB; `centred` reads 700 MB at its target, so that dense counts a fifth there."""
    lines = found.lines.set_index("rule")
    assert found.megabytes == pytest.approx(760) and lines.target_megabytes["centred"] == pytest.approx(700)
    assert lines.accuracy["centred"] == pytest.approx((0.8 * 33 + 0.2 * 36) / QUESTIONS)
    assert lines.delta["cats"] == pytest.approx(-12 / QUESTIONS)
    assert lines.low["cats"] < lines.delta["cats"] < lines.high["cats"]
    chance = np.mean([1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 4, 1 / 4])
    assert lines["share"]["cats"] == pytest.approx((24 / QUESTIONS - chance) / (36 / QUESTIONS - chance))


def test_a_rule_that_reads_more_is_named_and_not_put_in_order(found):
    """GRIFFIN's prompt is dense: 940 MB, and at no measured point 760."""
    last = found.lines.iloc[-1]
    assert last.rule == "griffin" and pd.isna(last.accuracy) and last.prompt == "dense"
    assert last.realised == pytest.approx(0.06 / 0.25)


def test_the_best_has_been_looked_for_and_ties_are_called_ties(found):
    assert found.level == pytest.approx(1 - 0.05 / 2)
    assert list(found.lines.rule[:3]) == ["centred", "chess", "cats"]
    near = equal_bytes.compare(
        record((*POINTS[:2], ("centred", 0.25, 0.24, 33), POINTS[3])),
        ["cats", "centred", "chess"],
        0.25,
        by="model_sparsity",
    )
    assert len(near.tied) == 1 and equal_bytes.words(near).endswith(" points, a tie.")
    assert "cats" not in near.tied


def test_a_table_shows_realised_sparsity_memory_and_what_weights_were(found):
    table = equal_bytes.table(found, record())
    memory = dict(zip(table.frame["rule"], table.frame["extra memory, of the MLP"], strict=True))
    assert memory["centred"] == "5.7\u00a0%" and memory["cats"] == "–"
    assert "4 bits (Q4_K_M GGUF)" in table.caption and "Altered tasks: sciq" in table.caption


def test_without_answers_there_is_no_comparison():
    rows = record()
    lost = (rows.rule == "chess") & (rows.task == "piqa")
    kept = equal_bytes.compare(rows[~lost], ["cats", "centred", "chess"], 0.5, by="gate_sparsity")
    assert pd.isna(kept.lines.set_index("rule").accuracy["chess"])
    assert equal_bytes.compare(rows, ["cats"], 0.5, by="gate_sparsity") is None
    with pytest.raises(CatsError, match="lacks the dense model's answers"):
        equal_bytes.compare(rows[rows.task != "piqa"], ["cats", "centred"], 0.5, by="gate_sparsity")


def test_losses_are_read_at_the_bytes_of_the_rule_that_reads_most():
    texts = record()[lambda rows: rows.task == AVERAGE].assign(corpus="plays")
    texts["delta_nll"] = [None, 0.4, 0.3, 0.2, 0.1]
    rises = equal_bytes.losses(texts, ["cats", "centred"]).set_index("rule")["plays, 50%"]
    assert rises["cats"] == pytest.approx(0.4) and rises["centred"] == pytest.approx(0.8 * 0.3)

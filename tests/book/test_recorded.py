"""Records in a chapter: found by name, newest first, and words where there is none."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import record_rows

from cats import paths
from cats.book.analysis import recorded, variants
from cats.evaluation.table import AVERAGE
from cats.evaluation.task_list import PAPER
from cats.records.packing import pack


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RECORDS", tmp_path)
    return tmp_path


def test_a_record_is_found_by_its_whole_name_and_the_newest_wins(folder):
    record_rows.write(folder, "one", rows=[record_rows.row("perplexity", note="first")])
    record_rows.write(folder, "one-more", rows=[record_rows.row("perplexity", note="other")])
    newest = record_rows.write(folder, "one", rows=[record_rows.row("perplexity", note="second")])
    assert newest.name == "perplexity-one-2.json"
    assert recorded.find("perplexity", "one").rows.note.tolist() == ["second"]
    assert recorded.find("perplexity", "on") is None
    assert recorded.find("zero_shot", "one") is None


def test_absent_records_are_said_to_be_absent(folder):
    record_rows.write(folder, "held")
    assert "record perplexity-held" in recorded.sentence("perplexity", "held")
    record_rows.write(folder, "more")
    both = recorded.sentence("perplexity", "held", "none", "more")
    assert "records perplexity-held, perplexity-more. No measurement is recorded under" in both
    for words in (recorded.sentence("perplexity", "none"), recorded.provenance("perplexity", ["none"])):
        assert words.startswith("No measurement is recorded under perplexity-none")
    lines = recorded.provenance("perplexity", ["held", "none"]).splitlines()
    assert len(lines) == 2 and lines[0].startswith("perplexity-held.json")
    assert recorded.rows("perplexity", ["none"]).empty
    assert recorded.rows("perplexity", ["none", "held"]).record.tolist() == ["held"]


def test_a_caption_says_how_weights_were_read_and_which_tasks_are_altered():
    rows = pd.DataFrame({"read_from": ["Q4_1 GGUF"] * 2, "task": ["piqa", "boolq_untitled"]})
    assert recorded.quality("Accuracy", rows) == (
        "Accuracy. Weights read back from 4 bits (Q4_1 GGUF). Altered tasks: boolq (passages without the "
        "article's title)."
    )
    assert recorded.quality("Loss", pd.DataFrame({"read_from": [None]})) == "Loss."


@pytest.mark.parametrize(
    "sparsity, label", [(0.5, "CATS 50%"), (0.0, "CATS"), (None, "CATS"), (float("nan"), "CATS")]
)
def test_labels_name_the_sparsity_where_there_is_one(sparsity, label):
    row = pd.Series({"method": "CATS", "gate_sparsity": sparsity}, dtype=object)
    assert recorded.label(row) == label


def test_variants_are_compared_with_cats_at_their_level():
    scores = {"dense": [1, 1, 1, 0] * 2, "cats": [1, 0, 0, 0] * 2, "refit": [1, 1, 0, 0] * 2}
    tasks = [
        {
            "rule": rule,
            "gate_sparsity": 0.5 if rule != "dense" else 0.0,
            "task": task,
            "correct": pack(np.asarray(values, dtype=float)),
            "acc": sum(values) / 8,
        }
        for task in [*PAPER, "lambada_openai"]
        for rule, values in scores.items()
    ]
    tasks = pd.DataFrame(tasks)
    maths = tasks[tasks.task == "piqa"].assign(exact_match=tasks.acc)
    losses = pd.DataFrame([{"rule": "refit", "gate_sparsity": 0.5, "corpus": "plays", "delta_nll": 0.1}])
    table = variants.tasks_frame(tasks, maths, losses, ["cats", "chess", "refit"])
    assert list(table[""]) == ["cats 50%", "refit 50%"]
    assert list(table.LAMBADA) == [0.25, 0.5] and list(table.GSM8K) == [0.25, 0.5]
    assert table["plays, nats"].isna().tolist() == [True, False]
    gain = table["GSM8K − CATS, points"]
    assert pd.isna(gain[0]) and gain[1].startswith("+25.0 [")
    alone = variants.tasks_frame(tasks, pd.DataFrame(), pd.DataFrame(), ["refit"])
    assert "LAMBADA" in alone and "GSM8K" not in alone


def test_what_two_records_share_is_held_answer_by_answer():
    def record(calibration, **answers):
        rows = [
            {
                "method": method,
                "rule": method,
                "gate_sparsity": 0.0 if method == "dense" else 0.5,
                "task": task,
                "documents": len(values),
                "correct": pack(np.asarray(values, dtype=float)),
            }
            for method, values in answers.items()
            for task in ("piqa", "boolq")
        ]
        rows.append(
            {"method": "dense", "rule": "dense", "gate_sparsity": 0.0, "task": AVERAGE, "correct": None}
        )
        return SimpleNamespace(rows=pd.DataFrame(rows), content={"parameters": {"calibration": calibration}})

    one = record("a", dense=[1, 0, 1], cats=[0, 0, 1])
    found = variants.again(one, record("a", dense=[1, 1, 1], cats=[0, 1, 0]))
    assert found.method.tolist() == ["dense", "cats"]
    assert found.answers.tolist() == [6, 6] and found.changed.tolist() == [2, 4]
    assert found.acc.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found.acc_again.tolist() == pytest.approx([1, 1 / 3])
    assert variants.again(one, record("b", dense=[1, 0, 1], cats=[0, 0, 1])).method.tolist() == ["dense"]
    assert variants.again(one, record("a", dense=[1, 0])).empty  # other documents

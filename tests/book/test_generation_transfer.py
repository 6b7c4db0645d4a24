"""Greedy agreement, reading in order, and what chapters draw of records: on toys, by hand where it can be."""

import math

import matplotlib
import pandas as pd
import pytest
import task_records
import torch
import toys
from evaluation_toys import tokenizer

from cats import corpora, paths
from cats.book.analysis import generation as maths
from cats.book.analysis import generation_live as greedy
from cats.book.analysis import perplexity as losses
from cats.book.analysis import recorded, transfer
from cats.book.plots import generation
from cats.book.plots import transfer as transfer_plots
from cats.calibration.calibrate import calibrate
from cats.calibration.observe import SparsityMeter
from cats.core.sparsify import restore, sparsify
from cats.criteria.masking import Policy
from cats.criteria.online import OnlineFit
from cats.criteria.rule import ThresholdFit
from cats.errors import CatsError
from cats.evaluation.perplexity import document_nll

DOCUMENTS = [("the cat sat on a mat and saw two birds fly over it again " * 4)[n : n + 90] for n in range(6)]


@pytest.fixture(scope="module")
def recorded_toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    task_records.write(folder, tmp_path_factory.mktemp("runs"))
    return folder


@pytest.fixture
def held(recorded_toys, monkeypatch):
    monkeypatch.setattr(paths, "RECORDS", recorded_toys)


@pytest.fixture
def model():
    return toys.toy("llama", max_position_embeddings=256)


@pytest.fixture
def thresholds(model):
    return calibrate(model, toys.batches())


def solved() -> pd.DataFrame:
    return recorded.rows("generation", [task_records.MATHS, task_records.MATHS_APART])


def transferred(experiment: str) -> pd.DataFrame:
    slugs = [task_records.TRANSFER + text for text in task_records.TEXTS]
    return transfer.from_records(recorded.rows(experiment, slugs), task_records.TRANSFER)


def texts(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


def test_prompts_are_rows_without_padding():
    corpus = corpora.Corpus("toy", "test", ["abcdefg", "hi"], {})
    batches = corpora.batches(corpus, tokenizer(), sequence_length=5, seed=None)
    found = greedy.prompts(batches)
    assert [tokenizer().decode(ids) for ids in found] == ["abcde", "fg", "hi"]


@pytest.mark.parametrize(
    ("first", "second", "equal"), [([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 1), ([], [5], 0), ([7], [8], 0)]
)
def test_common_tokens(first, second, equal):
    assert greedy.common(first, second) == equal


def test_a_curve_falls_where_texts_part_and_a_text_that_ends_alike_agrees():
    dense = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 2]]
    sparse = [[1, 2, 3, 4], [5, 0, 7, 8], [9, 2]]
    found = greedy.curve(dense, sparse, "CATS")
    assert found.token.tolist() == [0, 1, 2, 3, 4]
    assert found.share.tolist() == pytest.approx([1, 1, 2 / 3, 2 / 3, 2 / 3])
    assert found.length.iloc[0] == pytest.approx((4 + 1 + 4) / 3)


def test_continuations_are_those_of_generate_and_the_prompt_is_masked_or_not(model, thresholds):
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    dense, realised = greedy.continuations(model, tokenizer(), prompts, new_tokens=6)
    assert realised == {}
    for ids, added in zip(prompts, dense, strict=True):
        whole = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
        assert added == whole[len(ids) :]
    sparsify(model, thresholds, 0.5)
    _, everywhere = greedy.continuations(model, tokenizer(), prompts, new_tokens=6)
    policy = Policy(prefill="dense")
    _, apart = greedy.continuations(model, tokenizer(), prompts, new_tokens=6, policy=policy)
    assert everywhere["prefill"]["gate_sparsity"] > 0.2 and apart["prefill"]["gate_sparsity"] == 0
    assert everywhere["decode"]["gate_sparsity"] > 0.2 and apart["decode"]["gate_sparsity"] > 0.2


def test_greedy_texts_of_each_sparsity_and_policy_stand_beside_the_dense_ones(model, thresholds):
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    found = greedy.compare(model, tokenizer(), thresholds, prompts, [0.5, 0.9], new_tokens=4)
    assert list(found.texts) == ["dense", *found.curves] and len(found.curves) == 4
    assert found.tokens == sum(len(ids) for added in found.texts.values() for ids in added)
    assert found.realised["CATS 50%, decode only"]["prefill"] == 0
    assert not any(type(module).__name__ == "CatsMLP" for module in model.modules())
    frame = greedy.table(found).frame
    means = [f"{each.length.iloc[0]:.1f}" for each in found.curves.values()]
    assert list(frame["equal tokens"]) == means
    assert all(f" for {mean}" in greedy.words(found, "toy") for mean in means)
    assert list(greedy.example(found, tokenizer(), prompts).frame.iloc[:, 0])[:2] == ["prompt", "dense"]


def test_notes_for_a_calculator_are_left_out_and_what_is_broken_is_kept():
    texts = {"question": "Question: 2*3?", "dense": "2*3=<<2*3=6>>6\n#### 6", "sparse": "2*<<2*<<2*"}
    row = {
        **{"rule": "cats", "method": "CATS", "gate_sparsity": 0.5, "delta": -1.0, "policy": None},
        "examples": [{"document": 0, **texts}],
    }
    assert maths.broken(pd.DataFrame([row])).text.tolist() == ["2*3?", "2*3=6\n#### 6", "2*<<2*<<2*"]


def test_reading_is_document_nll_and_counts_what_is_zeroed(model, thresholds):
    texts = [text[: 20 + 9 * number] for number, text in enumerate(DOCUMENTS)]  # some need padding
    dense = transfer.read(model, tokenizer(), texts, tokens=40, max_length=64)
    expected = document_nll(model, tokenizer(), texts, tokens_per_document=40, max_length=64)
    assert dense.by_layer is None
    pd.testing.assert_frame_equal(dense.scores, expected, rtol=1e-5)
    options = {"fit": ThresholdFit("cats", thresholds), "sparsity": 0.5, "tokens": 40, "max_length": 64}
    found = transfer.read(model, tokenizer(), texts, **options)
    sparsify(model, thresholds, 0.5)
    with SparsityMeter(model) as meter:
        again = document_nll(model, tokenizer(), texts, tokens_per_document=40, max_length=64)
    restore(model)
    pd.testing.assert_frame_equal(found.scores, again, rtol=1e-4)
    torch.testing.assert_close(found.by_layer, meter.by_layer, atol=1e-4, rtol=0)
    row = transfer.row(found, dense, gate_sparsity=0.5, calibrated="a", evaluated="b", rule="cats")
    rise = (again.nll_nats.sum() - expected.nll_nats.sum()) / expected.tokens.sum()
    assert row["delta_nll"] == pytest.approx(rise, rel=1e-4)
    drifts = meter.by_layer - 0.5
    assert row["drift"] == pytest.approx(meter.overall - 0.5, abs=1e-4)
    assert abs(row["worst_layer"]) == pytest.approx(float(drifts.abs().max()), abs=1e-4)
    layers = transfer.by_layer(found, row)
    assert layers.drift.tolist() == pytest.approx(drifts.tolist(), abs=1e-4)
    assert layers.label.unique().tolist() == ["from a, fixed"]


def test_thresholds_that_are_corrected_come_nearer_to_the_target(model, thresholds):
    """Calibrated on random tokens; a long text of few letters zeroes another share."""
    options = {"sparsity": 0.7, "tokens": 80, "max_length": 128}
    fits = ThresholdFit("cats", thresholds), OnlineFit("online", thresholds)
    once, often = (
        [transfer.read(model, tokenizer(), documents, fit=fit, **options) for fit in fits]
        for documents in (DOCUMENTS[:1], DOCUMENTS * 10)
    )
    torch.testing.assert_close(once[0].by_layer, once[1].by_layer)  # nothing was seen before
    assert often[1].scores.document.tolist() == list(range(60))
    miss = [(reading.by_layer - 0.7).abs().mean() for reading in often]
    assert miss[1] < miss[0] / 2
    assert not any(type(module).__name__ == "CatsMLP" for module in model.modules())


def test_thresholds_of_each_text_are_read_on_each_text(model, thresholds):
    texts = {"a": DOCUMENTS[:3], "b": DOCUMENTS[3:]}
    both = {"a": thresholds, "b": thresholds}
    found = transfer.cross(model, tokenizer(), both, texts, [0.5], tokens=40, max_length=64)
    pairs = list(zip(found.rows.evaluated, found.rows.calibrated, found.rows.rule, strict=True))
    assert pairs == [
        *(("a", "a", "cats"), ("a", "b", "cats"), ("a", "b", "online")),
        *(("b", "a", "cats"), ("b", "b", "cats"), ("b", "a", "online")),
    ]
    assert found.tokens == 4 * sum(found.read.values()) and len(found.layers) == 6 * 3
    worst = 100 * found.rows[found.rows.rule == "online"].worst_layer.abs().max()
    assert f"by more than {worst:.1f}, documents" in transfer.live_words(found, "toy")
    assert len(transfer.live_table(found.rows).frame) == 6
    alone = transfer.cross(model, tokenizer(), {"a": thresholds}, {"a": DOCUMENTS[:3]}, [0.5], max_length=64)
    assert transfer.live_words(alone, "toy").startswith("Both texts are the same")


def test_a_model_is_dense_again_where_reading_fails(model, thresholds):
    with pytest.raises(CatsError, match="No document has a token"):
        transfer.read(
            model,
            tokenizer(),
            ["the cat", "a"],
            fit=OnlineFit("online", thresholds),
            sparsity=0.5,
            max_length=64,
        )
    assert not any(type(module).__name__ == "CatsMLP" for module in model.modules())


@pytest.mark.usefixtures("held")
def test_recorded_answers_are_compared_problem_by_problem():
    table = maths.table(solved())
    assert table[""].tolist() == ["dense", "CATS 50%", "CATS 70%", "CATS 50%"]
    assert table.masked.tolist()[1:] == [maths.EVERYWHERE] * 2 + [maths.DECODE_ONLY]
    assert table["solved, %"].iloc[0].startswith("75.0 ± ")
    assert table["gained, lost"].tolist()[1:] == ["0, 2", "0, 3", "0, 1"]
    assert table["realised, prompt"].iloc[3] == 0 and table["realised, prompt"].iloc[1] > 0.2
    costs = maths.prompt_costs(solved())
    assert costs.label.tolist() == ["CATS 50%"]
    assert costs.delta.tolist() == pytest.approx([-1 / 8])
    assert costs.low[0] <= -1 / 8 <= costs.high[0]


@pytest.mark.usefixtures("held")
def test_what_breaks_is_shown_as_both_models_wrote_it():
    broken = maths.broken(solved())
    assert broken[""].tolist()[:4] == ["question", "dense", "CATS 50%", "CATS 70%"]
    assert broken.text.iloc[0].startswith("4+2?")  # the first that 50 % loses; 70 % lost it too
    assert (broken[""] == "question").sum() == 3 and maths.broken(solved(), problems=1).shape == (4, 2)


@pytest.mark.usefixtures("held", "themed")
def test_shares_kept_stand_beside_the_rebuttals():
    points = maths.kept(solved())
    reported = points[points.reported]
    assert reported.gate_sparsity.tolist() == [0.5, 0.7, 0.9]
    assert reported.value.iloc[0] == pytest.approx(12.28 / 12.59)
    measured = points[~points.reported]
    assert measured.value.tolist() == pytest.approx([4 / 6, 3 / 6, 5 / 6])
    assert (measured.low <= measured.value).all() and (measured.value <= measured.high).all()
    assert maths.words(solved()).replace("\u00a0", "") == (
        "With all tokens masked, toy-llama keeps of its dense score 67% at 50% gate sparsity (the rebuttal's "
        "Llama-2-7B 98%) and 50% at 70% gate sparsity (the rebuttal's Llama-2-7B 72%)."
    )
    figure = generation.over_sparsity(points, "share", dense=1.0)
    assert {"Llama-2-7B, paper", "CATS, all tokens", "CATS, decode only"} <= texts(figure)


@pytest.mark.usefixtures("themed")
def test_without_records_the_rebuttal_is_drawn_alone():
    nothing = pd.DataFrame()
    assert set(maths.kept(nothing).series) == {"Llama-2-7B, paper"}
    assert maths.words(nothing).startswith("No run")
    assert maths.broken(nothing).empty and maths.prompt_costs(nothing).empty
    rises = losses.rises(nothing)
    assert rises.value.tolist() == pytest.approx([0.023, 0.027])
    figure = generation.over_sparsity(rises, "nats", dense=0.0, log=True)
    assert len(figure.axes) == 1 and "Mistral-7B, paper" in texts(figure)
    assert transfer.from_records(nothing, task_records.TRANSFER).empty
    assert "No run" in transfer.words(nothing)


@pytest.mark.usefixtures("held", "themed")
def test_losses_of_models_have_a_panel_a_text_and_a_column_a_record():
    slugs = [task_records.TRANSFER + text for text in task_records.TEXTS]
    rows = recorded.rows("perplexity", slugs)
    table = losses.table(rows[rows.corpus == task_records.TEXTS[1]])
    assert table.columns.tolist() == ["nats a token", *slugs]
    assert table["nats a token"].tolist() == [
        *("dense", "dense, as perplexity", "CATS 50%", "CATS, corrected online 50%")
    ]
    assert float(table[slugs[0]].iloc[1]) == pytest.approx(math.exp(float(table[slugs[0]].iloc[0])), rel=0.01)
    assert "[" in table[slugs[1]].iloc[2]
    rises = losses.rises(rows)
    assert set(rises.panel) == set(task_records.TEXTS) and rises.reported.sum() == 4
    figure = generation.over_sparsity(rises, "nats", dense=0.0, log=True)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(task_records.TEXTS)


@pytest.mark.usefixtures("held", "themed")
def test_recorded_transfers_are_drawn_beside_the_live_ones():
    rows = transferred("perplexity")
    assert len(rows) == 2 * 2 * 2 and set(rows.calibrated) == set(task_records.TEXTS)
    assert rows.drift.tolist() == pytest.approx((rows.realised_sparsity - 0.5).tolist())
    table = transfer.table(rows)
    assert table.thresholds.tolist() == ["fixed", "online"] * 4
    assert table["calibrated on"].tolist() == ["cats.txt", "cats.txt", "dogs.txt", "dogs.txt"] * 2
    assert "loss − dense [95 %]" in table.columns and "worst layer" not in table
    for value in ("drift", "delta_nll"):
        figure = transfer_plots.dots({"live": rows, "a record": rows}, value, value)
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["live", "a record"]
        assert {"from cats.txt, fixed", "dogs.txt"} <= texts(figure)


@pytest.mark.usefixtures("held")
def test_tasks_say_what_the_choice_of_text_changes():
    rows = transferred("zero_shot")
    assert set(rows.evaluated) == {"piqa", "lambada_openai"}
    assert "− dense, points [95 %]" in transfer.table(rows).columns
    words = transfer.words(rows)
    assert words.startswith("At 50\u00a0%, fixed thresholds from cats.txt drift by ")
    assert "those from dogs.txt" in words and "corrected online" in words


@pytest.mark.usefixtures("themed")
def test_figures_of_live_texts_have_a_line_each():
    curves = [greedy.curve([[1, 2, 3]], [[1, 2, n]], f"CATS {n}") for n in (3, 4)]
    figure = generation.agreement(curves)
    assert len(figure.axes[0].lines) == 2 and {"CATS 3", "CATS 4"} <= texts(figure)
    lines = pd.DataFrame(
        [
            {"evaluated": text, "label": label, "layer": n, "drift": 0.01 * n}
            for text in ("one", "two")
            for label in ("from one, fixed", "from one, online")
            for n in range(3)
        ]
    )
    figure = transfer_plots.by_layer(lines)
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
    assert list(figure.axes[1].lines[0].get_ydata()) == pytest.approx([0, 1, 2])

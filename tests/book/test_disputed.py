"""Rivals and disputes: bytes, ranks and fronts by hand, and sweeps read from records of an evaluator."""

import evaluation_toys
import matplotlib
import numpy as np
import pandas as pd
import pytest
import toys

from cats import criteria, paths
from cats.book.analysis import anatomy, rivals
from cats.book.analysis import anova as variance
from cats.book.analysis import disputed as disputes
from cats.book.plots import anatomy as anatomy_plots
from cats.book.plots import disputed as disputed_plots
from cats.book.plots import rivals as rivals_plots
from cats.corpora import Calibration
from cats.criteria.masking import Policy
from cats.errors import CatsError
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.method import Method
from cats.evaluation.table import AVERAGE, load_results, write_records
from cats.records import record as records

pytestmark = pytest.mark.usefixtures("themed")


def rows(**values) -> pd.DataFrame:
    return pd.DataFrame({"rule": ["dense", "cats", "teal"], **values})


def words(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


def test_bytes_follow_what_was_realised():
    # a model of 100 bytes, 80 of them in blocks: a target of a quarter saves 20, realised 0.2 saves 16
    table = rows(
        bytes_per_token=[100.0, 80.0, 80.0],
        model_sparsity=[0.0, 0.25, 0.25],
        realised_model_sparsity=[0.0, 0.2, 0.3],
    )
    assert rivals.read_bytes(table).tolist() == pytest.approx([100, 84, 76])
    with pytest.raises(CatsError, match="evaluate the dense model as well"):
        rivals.read_bytes(table[1:])
    found = rivals.placed(table.assign(delta_nll=[None, 0.3, 0.1]))
    assert found.rule.tolist() == ["teal", "cats"] and found.megabytes.tolist() == pytest.approx(
        [76e-6, 84e-6]
    )


def test_the_front_holds_what_nothing_beats():
    assert rivals.front([1, 2, 2, 3, 3], [5, 4, 6, 4, 1]) == [True, True, False, False, True]
    assert rivals.front([1, 1], [2, 2]) == [True, True]


def test_a_headline_says_what_cats_and_the_best_rule_lose():
    table = pd.DataFrame(
        {"rule": ["teal", "cats", "griffin", "cats", "teal"], "level": [0.25] * 3 + [0.4] * 2}
    )
    table = table.assign(lost=[-0.1, 0.3, 0.5, 1.0, 2.0], realised_model_sparsity=table.level)
    table.loc[2, "realised_model_sparsity"] = 0.06  # a prompt read dense
    assert rivals.headline(table, "nats") == (
        "at 25% CATS loses 0.300 nats, teal, the best of 2 rules, -0.100; "
        "at 40% cats, the best of 2 rules, loses 1.000 nats."
    )
    others = table[table.rule != "cats"]
    assert rivals.headline(others[:1]) == "at 25% teal, the best of 1 rules, loses -0.1 points."
    said = rivals.widest(table.assign(delta_low=0.0, delta_high=[0.01, 0.03, 0.02, 0.5, 0.5]))
    assert said == "At 25% the widest 95 % interval is ± 1.5 points, that of cats."


def test_a_duel_names_who_loses_less():
    table = pd.DataFrame({"rule": ["cats", "teal"], "level": 0.4, "lost": [0.3, 0.1]})
    assert rivals.duel(table).endswith("TEAL (uniform) loses less.")
    assert rivals.duel(table.assign(lost=[0.1, 0.3])).endswith("TEAL (uniform) loses more.")
    assert "not both measured" in rivals.duel(table[:1])


def test_every_rule_has_a_family_and_a_word_on_its_kernel():
    for name in criteria.RULES:
        assert rivals.family(name) in rivals.FAMILIES and rivals.kernel(name)
    assert set(rivals.KERNELS) <= set(criteria.RULES)
    assert rivals.kernel("combined") == rivals.SAME
    assert rivals.family("wina-released") == rivals.ALL_INPUTS and rivals.family("griffin") == rivals.SEQUENCE


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy(), "all"),
        (Policy(first_token="dense"), "all but the first"),
        (Policy(last_share=0.5), "last 50%"),
        (Policy(last_share=0.99, first_token="dense"), "last 99%, not the first"),
        (Policy(prefill="dense"), "none of the prompt"),
    ],
)
def test_policies_have_words_and_words_have_policies(policy, said):
    assert disputes.tokens_masked(policy.describe()) == said
    assert disputes.policies([said]) == [policy]


def test_masking_fewer_tokens_harder_is_held_against_all_of_them_less():
    table = pd.DataFrame(
        {
            "sparsity": ["25%", "40%", "25%", "40%"],
            "tokens masked": ["all", "all", "last 50%", "last 50%"],
            "realised_model_sparsity": [0.25, 0.4, 0.125, 0.2],
            disputes.LOSS: [0.3, 3.0, 0.1, 1.5],
        }
    )
    (said,) = disputes.concentrated(table).values()
    assert said == (
        "last 50% at 40% does without 20.0% of the weights and loses 1.50 nats, "
        "all tokens at 25% do without 25.0% and lose 0.30."
    )
    (said,) = disputes.concentrated(table[table["tokens masked"] == "all"]).values()
    assert "no setting" in said


@pytest.fixture(scope="module")
def recorded_sweep(tmp_path_factory):
    """A folder of records of a toy model as data/plans/disputes.yml names them, written by a evaluator."""
    folder = tmp_path_factory.mktemp("records")
    mirrors = evaluation_toys.mirrors(tmp_path_factory.mktemp("mirrors"))
    loaded = evaluation_toys.loaded()
    policies = [Policy(), Policy(last_share=0.5)]
    wanted = [
        Method(),
        *(
            Method(rule, level, policy, "model")
            for rule in ("cats", "allocated")
            for level in (0.1, 0.2)
            for policy in policies
        ),
    ]
    for text, corpus in (("docs", "python-docs"), ("plays", "shakespeare")):
        for suffix, padding in (("", "excluded"), ("-padding", "counted")):
            calibration = Calibration(corpus, rows=16, sequence_length=32, padding=padding, batch_size=16)
            evaluator = Evaluator(
                loaded,
                tmp_path_factory.mktemp("runs"),
                data_dir=str(mirrors),
                calibration=calibration,
                documents=2,
                text_tokens=12,
            )
            found = load_results(evaluator.run(["piqa", "text:python-docs"], wanted, progress=False))
            write_records(
                found,
                f"disputes-toy-{text}{suffix}",
                parameters={"calibration": calibration.describe()},
                folder=folder,
            )
    return folder


def test_a_sweep_is_read_back_balanced_and_split_exactly(recorded_sweep, monkeypatch):
    monkeypatch.setattr(paths, "RECORDS", recorded_sweep)
    table = disputes.sweep(disputes.slugs("toy"))
    assert len(table) == 2**5
    found = variance.analyse(table, disputes.LOSS, disputes.CHOICES)
    assert found.factors == disputes.CHOICES
    assert found.table.share.sum() == pytest.approx(1) and found.explained(5) == pytest.approx(1)
    record = records.every("perplexity", folder=recorded_sweep)[0].rows
    wanted = record[(record.rule == "cats") & (record.model_sparsity.round(3) == 0.1)].iloc[0]
    same = table[
        (table.sparsity == "10%")
        & (table["tokens masked"] == "all")
        & (table["calibration text"] == "python-docs")
        & (table.padding == "excluded")
        & (table.allocation == "uniform")
    ]
    assert same[disputes.LOSS].tolist() == pytest.approx([wanted.delta_nll])
    (row,) = disputes.summary({"toy": found}).to_dict("records")
    assert row["sweep"] == "toy" and row["apart"] == pytest.approx(np.ptp(found.cells))
    assert row[disputes.EXPLAINED] == found.explained() and len(row["lowest"].split(", ")) == 5
    moved = disputes.moves("toy", found).set_index("choice")
    losses = table.groupby("sparsity")[disputes.LOSS].mean()
    assert moved.moves["sparsity"] == pytest.approx(np.ptp(losses))
    assert moved.kept["sparsity"] == losses.idxmin()
    scores = variance.analyse(table, disputes.ACCURACY, disputes.CHOICES)
    best = table.groupby("allocation", sort=False)[disputes.ACCURACY].mean().idxmax()
    assert disputes.moves("toy", scores).set_index("choice").kept["allocation"] == best
    accuracy = table[disputes.ACCURACY]
    assert accuracy.notna().all() and accuracy.abs().max() <= 100
    assert disputes.sweep(["disputes-none-docs"]).empty
    figure = disputed_plots.effects(found, disputes.LOSS)
    assert {"tokens masked", "last 50%", "counted", "by layer"} <= words(figure)
    (axes,) = disputed_plots.shares({"toy": found, "again": found}).axes
    assert {"toy", "again", "padding", "pairs of choices", "more"} <= words(axes.figure)
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert len(ends) == 2 * (5 + 2) and ends[-2:] == pytest.approx([1, 1])


def test_records_of_rules_are_placed_summed_up_and_drawn(recorded_sweep):
    texts, tasks = (
        records.every(experiment, folder=recorded_sweep)[0].rows for experiment in ("perplexity", "zero_shot")
    )
    texts, tasks = (
        rows[(rows.rule == "dense") | rows.policy.map(lambda policy: policy == Policy().describe())]
        for rows in (texts, tasks)
    )
    placed = rivals.placed(texts)
    assert placed.level.tolist() == [0.1, 0.1, 0.2, 0.2]
    assert (placed.megabytes * 1e6 < texts.bytes_per_token.max()).all()
    average = tasks.assign(task=AVERAGE)
    table = rivals.summary(average, texts)
    assert table.columns.tolist() == [
        *("rule", "points at 10% [95 %]", "points at 20% [95 %]", "nats at 10%", "nats at 20%"),
    ]
    assert sorted(table.rule) == ["allocated", "cats"]
    first = average[average.rule == "cats"].delta_acc.iloc[0]
    assert table.set_index("rule")["points at 10% [95 %]"]["cats"].startswith(f"{100 * first:+.2f}")
    points = rivals.averages(average)
    assert points.lost.iloc[0] == pytest.approx(-100 * average.delta_acc[points.index[0]])
    with pytest.raises(CatsError, match="no average of the eight tasks"):
        rivals.averages(tasks)
    assert rivals.missing(placed, ["cats", "teal"], [0.1, 0.2]) == ["teal"]
    assert rivals.missing(placed, ["cats"], [0.1, 0.4]) == ["cats at 40%"]
    dense_prompt = placed.assign(realised_model_sparsity=[0.05, 0.1, 0.2, 0.1])
    assert rivals.reached(dense_prompt).index.tolist() == placed.index[[1, 2]].tolist()
    better = placed.assign(lost=-placed.lost.abs())  # sparse may lose less than dense
    figure = rivals_plots.pareto({"live": placed, "toy": better[better.rule == "cats"]})
    drawn = [y for line in figure.axes[1].lines for y in line.get_ydata()]
    assert min(drawn) == pytest.approx(better[better.rule == "cats"].lost.min())
    assert len(figure.axes) == 2 and {"live", "toy", "cats", "allocated", "Pareto front"} <= words(figure)


def test_measures_are_drawn_layer_by_layer():
    model = toys.toy("llama")
    fit = criteria.rule("cats").calibrate(model, toys.batches(2), progress=False)
    fit.apply(model, 0.5)
    found = anatomy.measure(model, toys.batches(2), sizes=(1, 2, 4), progress=False)
    layers = len(found.frequency)
    figure = anatomy_plots.frequencies({"one": found, "two": found})
    assert all(len(axes.lines) == layers + 1 for axes in figure.axes)
    curve = figure.axes[0].lines[0].get_ydata()
    assert curve[0] == pytest.approx(float(found.frequency[0].max())) and (curve[:-1] >= curve[1:]).all()
    table = found.by_layer()
    figure = anatomy_plots.by_layer({"one": table, "two": table})
    assert {"never active", "active for most tokens", "one", "two"} <= words(figure)
    figure = anatomy_plots.chunks({"one": found.chunks})
    assert len(figure.axes[0].lines) == layers + 3

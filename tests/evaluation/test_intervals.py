"""Differences, intervals and tests over documents, by hand and against their definition."""

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_1samp, ttest_ind

from cats.errors import CatsError
from cats.evaluation import intervals
from cats.evaluation.intervals import summarise
from cats.evaluation.task_list import PAPER, TASKS


def test_pairs_by_hand():
    dense, sparse = [1, 1, 1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 0, 0, 1]
    found = intervals.difference(dense, sparse)
    assert found["delta"] == pytest.approx(-0.25)
    assert (found["gained"], found["lost"]) == (1, 3)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 16)  # P(X <= 1) of four fair coins, twice
    assert found["low"] < -0.25 < found["high"]
    assert intervals.mcnemar(0, 0)["mcnemar_p"] == 1.0


def test_the_interval_is_the_bootstrap_over_documents():
    generator = np.random.default_rng(3)
    dense, sparse = generator.random(300) < 0.6, generator.random(300) < 0.55
    found = intervals.difference(dense, sparse)
    steps = sparse.astype(float) - dense
    draws = steps[generator.integers(0, 300, (10_000, 300))].mean(1)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)


def test_pairs_need_the_same_documents():
    with pytest.raises(CatsError, match="cannot be paired"):
        intervals.difference([1, 0], [1])
    with pytest.raises(CatsError, match="No document"):
        intervals.difference([], [])


def test_one_bootstrap_for_means_and_for_ratios_is_that_of_scipy():
    generator = np.random.default_rng(5)
    steps, tokens = generator.normal(0.3, 1, 60), generator.integers(5, 50, 60).astype(float)
    ours = intervals.difference(np.zeros(60), steps, units=tokens)

    def ratio(sums, units, axis=-1):
        return sums.sum(axis) / units.sum(axis)

    theirs = bootstrap(
        (steps, tokens), ratio, paired=True, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert ours["delta"] == pytest.approx(steps.sum() / tokens.sum())
    width = theirs.high - theirs.low
    assert [ours["low"], ours["high"]] == pytest.approx([theirs.low, theirs.high], abs=0.04 * width)
    assert ours["interval"] == intervals.BOOTSTRAP


@pytest.mark.parametrize(
    ("documents", "how"), [(1, None), (7, None), (8, "t"), (29, "t"), (30, intervals.BOOTSTRAP)]
)
def test_few_documents_give_the_interval_of_student_or_none(documents, how):
    generator = np.random.default_rng(documents)
    steps = generator.normal(0.2, 1, documents)
    found = intervals.difference(np.zeros(documents), steps)
    assert found["delta"] == pytest.approx(steps.mean()) and found["interval"] == how
    if how == "t":
        expected = ttest_1samp(steps, 0).confidence_interval(0.95)
        assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high])
    elif how is None:
        assert found["low"] is None and found["high"] is None
        assert intervals.as_text(found["delta"], None, None) == f"{found['delta']:+.4f}"


def test_intervals_over_twelve_documents_hold_the_mean_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = intervals.difference(np.zeros(12), generator.normal(0.1, 1, 12))
        held += found["low"] <= 0.1 <= found["high"]
    assert held / 400 > 0.92  # the bootstrap's hold it in 0.90


def test_the_mean_over_tasks_weighs_tasks_equally():
    found = intervals.mean_difference([([0] * 2, [1] * 2), ([1] * 10, [1] * 10)])
    assert found == {"delta": 0.5, "low": None, "high": None, "interval": None}
    found = intervals.mean_difference([([0] * 8, [1] * 8), ([1] * 10, [1] * 10)])
    assert found == {"delta": 0.5, "low": 0.5, "high": 0.5, "interval": "t"}
    found = intervals.mean_difference([([0] * 30, [1] * 30), ([1] * 90, [1] * 90)])
    assert found == {"delta": 0.5, "low": 0.5, "high": 0.5, "interval": intervals.BOOTSTRAP}


def test_a_mean_over_small_tasks_has_the_interval_of_welch():
    generator = np.random.default_rng(2)
    first, second = generator.normal(0, 1, 9), generator.normal(1, 3, 20)
    found = intervals.mean_difference([(np.zeros(9), first), (second, np.zeros(20))])
    welch = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert [2 * found["low"], 2 * found["high"]] == pytest.approx([welch.low, welch.high])


def test_the_best_is_held_against_the_second_best_of_all_that_were_looked_at():
    generator = np.random.default_rng(7)
    base = generator.random(400)
    scores = {"a": base, "b": base + 0.5, "c": base + 0.5 + generator.normal(0.2, 1, 400), "d": base - 1}
    found = intervals.against_runner_up(scores)
    assert (found["best"], found["second"]) == ("c", "b")
    assert found["level"] == pytest.approx(1 - 0.05 / 3)
    alone = intervals.difference(scores["b"], scores["c"])
    assert found["delta"] == pytest.approx(alone["delta"])
    assert found["low"] < 0 < alone["low"] and found["high"] > alone["high"]
    assert found["tie"]  # of four methods; of these two alone it would be none
    assert not intervals.against_runner_up({name: scores[name] for name in "bc"})["tie"]
    lowest = intervals.against_runner_up(scores, lower_is_better=True)
    assert (lowest["best"], lowest["second"], lowest["delta"]) == ("d", "a", pytest.approx(1))
    same = intervals.against_runner_up({"a": base, "b": base[::-1] + 1e-9})
    assert same["tie"] is True
    with pytest.raises(CatsError, match="two methods"):
        intervals.against_runner_up({"a": base})


def test_intervals_as_text():
    assert intervals.as_text(0.1234, 0.1, 0.2, "+.2f") == "+0.12 [+0.10, +0.20]"
    assert intervals.as_text(0.1234, None, None, "+.1f", scale=100) == "+12.3"
    assert intervals.as_text(0.1234, np.nan, np.nan) == "+0.1234"
    assert intervals.as_text(None, None, None) == intervals.as_text(np.nan, None, None) == "-"


def test_chance_is_taken_off_both_shares():
    assert intervals.share_above_chance(0.4, 0.5, 0.25) == pytest.approx(0.6)
    assert np.isnan(intervals.share_above_chance(0.3, 0.25, 0.25))
    assert TASKS["piqa"].chance == 0.5 and TASKS["arc_challenge"].chance == 0.25
    assert sum(TASKS[name].chance for name in PAPER) / 8 == 2.75 / 8


def test_a_curve_is_read_between_its_points_at_equal_bytes():
    read, loss = [100, 60, 80], [3.0, 3.4, 3.1]  # in any order
    assert intervals.at_equal_bytes(read, loss, 80) == pytest.approx(3.1)
    assert intervals.at_equal_bytes(read, loss, 70) == pytest.approx(3.25)
    assert intervals.at_equal_bytes(read, loss, 95) == pytest.approx(3.025)
    assert intervals.at_equal_bytes(read, loss, 59) is None
    assert intervals.at_equal_bytes(read, loss, 101) is None
    for wrong in ([100, 100, 80], [100, 60]):
        with pytest.raises(CatsError, match="different numbers of bytes"):
            intervals.at_equal_bytes(wrong, loss, 80)


def test_summaries_by_hand():
    scores = {"acc": np.array([1.0, 0, 1, 0]), "word_perplexity": np.array([[-2.0, 1], [-4, 2]])}
    found = summarise(scores)
    assert found["acc"] == 0.5 and found["acc_se"] == pytest.approx(np.sqrt(1 / 3) / 2)
    assert found["word_perplexity"] == pytest.approx(np.exp(2)) and found[
        "word_perplexity_se"
    ] == pytest.approx(0)

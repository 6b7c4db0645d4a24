"""Analysis of variance: sums of squares by hand, exactness on any balanced design, and what is refused."""

import itertools

import numpy as np
import pandas as pd
import pytest

from cats.book.analysis import anova as variance
from cats.errors import CatsError


def sweep(cells: dict, names=("rule", "text")) -> pd.DataFrame:
    return pd.DataFrame(
        [{**dict(zip(names, key, strict=True)), "loss": value} for key, value in cells.items()]
    )


def test_two_choices_by_hand():
    # means 3 and 7 of the rows, 4 and 6 of the columns, 5 of all: 2 ± 1 inside each row but for ± 0.5
    rows = sweep({("a", "x"): 2.5, ("a", "y"): 3.5, ("b", "x"): 5.5, ("b", "y"): 8.5})
    found = variance.analyse(rows, "loss", ["rule", "text"])
    assert found.mean == 5
    assert found.effects["rule",].tolist() == [-2, 2]
    assert found.effects["text",].tolist() == [-1, 1]
    assert found.effects["rule", "text"].tolist() == [[0.5, -0.5], [-0.5, 0.5]]
    assert found.sums == {("rule",): 16, ("text",): 4, ("rule", "text"): 1}
    assert found.total == 21 and found.within == 0
    table = found.table.set_index("effect")
    assert table.share["rule"] == pytest.approx(16 / 21) and table.share.sum() == pytest.approx(1)
    assert table.degrees_of_freedom.tolist() == [1, 1, 1] and table.range["rule"] == 4
    assert found.explained(1) == pytest.approx(20 / 21) and found.explained(2) == 1
    assert found.extremes() == ({"rule": "a", "text": "x"}, {"rule": "b", "text": "y"})
    # 8.5 - 2.5 = 6 = 4 (rule) + 2 (text) + 0 (both)
    assert found.spread(1) == (6, 1) and found.spread(2) == (6, 1)
    means = found.means("text")
    assert means["mean"].tolist() == [4, 6] and means.low.tolist() == [2.5, 3.5]
    assert means.high.tolist() == [5.5, 8.5]


def test_repetitions_are_apart():
    rows = pd.concat([sweep({("a", "x"): 1, ("a", "y"): 3, ("b", "x"): 1, ("b", "y"): 3})] * 2)
    rows["loss"] = rows["loss"] + np.repeat([-0.5, 0.5], 4)
    found = variance.analyse(rows, "loss", ["rule", "text"])
    # the text: 8 (±1)²; the repetitions: 8 (±0.5)²
    assert found.sums["text",] == 8 and found.within == 2 and found.explained(2) == pytest.approx(0.8)
    assert found.table.effect.tolist()[:2] == ["text", variance.WITHIN]


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 4), (2, 2, 7, 2, 2)])
def test_shares_sum_to_one_and_effects_rebuild_every_cell(shape):
    names = [f"choice {axis}" for axis in range(len(shape))]
    values = np.random.default_rng(len(shape)).normal(size=shape)
    cells = itertools.product(*map(range, shape))
    rows = sweep({cell: values[cell] for cell in cells}, names).sample(frac=1, random_state=0)
    found = variance.analyse(rows, "loss", names)
    sorted_values = values[np.ix_(*found.levels)]
    assert found.total == pytest.approx(((values - values.mean()) ** 2).sum())
    assert found.explained(len(shape)) == pytest.approx(1)
    rebuilt = np.full(shape, found.mean)
    for chosen, effect in found.effects.items():
        axes = [names.index(name) for name in chosen]
        rebuilt = rebuilt + effect.reshape([shape[a] if a in axes else 1 for a in range(len(shape))])
        assert effect.sum(0) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(rebuilt, sorted_values)
    assert found.spread(len(shape)) == (pytest.approx(np.ptp(values)), pytest.approx(1))


def test_a_choice_without_alternative_and_a_constant_result():
    rows = sweep({("a", "x"): 1.0, ("a", "y"): 1.0})
    found = variance.analyse(rows, "loss", ["rule", "text"])
    assert found.factors == ("text",) and found.explained() == 0 and found.spread() == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "lacks rule b, text y"),
        (lambda rows: pd.concat([rows, rows[:1]]), "some combinations 1 times and others 2"),
        (lambda rows: rows.assign(loss=[None, 1, 2, 3]), "rows without loss"),
        (lambda rows: rows.drop(columns="text"), "no column 'text'"),
        (lambda rows: rows[:1], "No choice of the sweep has two levels"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(change, message):
    rows = sweep(dict(zip(itertools.product("ab", "xy"), [1.0, 2.0, 3.0, 4.0], strict=True)))
    with pytest.raises(CatsError, match=message):
        variance.analyse(change(rows), "loss", ["rule", "text"])

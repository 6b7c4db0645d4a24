"""A measured value beside the paper's: the verdict, and the table of them."""

import pytest

from cats.book import comparison


@pytest.mark.parametrize(
    ("reported", "reproduced", "tolerance", "expected"),
    [
        (0.65, 0.64, 0.01, comparison.REPRODUCED),
        (0.65, 0.6399, 0.01, comparison.NOT_REPRODUCED),
        (2.18, 2.25, 0.05, comparison.NOT_REPRODUCED),
        (2.18, None, 0.05, comparison.NOT_MEASURED),
        (-15.4, -15.4, 0.0, comparison.REPRODUCED),
    ],
)
def test_verdict(reported, reproduced, tolerance, expected):
    assert comparison.verdict(reported, reproduced, tolerance) == expected


def test_another_model_is_not_judged_even_where_the_numbers_agree():
    assert comparison.verdict(2.18, 2.18, 0.05, differs="other model") == "not comparable (other model)"


def test_comparison_table_shows_all_columns_and_no_index():
    rows = [
        comparison.Comparison("a", "loss, nats", 2.18, 2.2, 0.05, "X, CPU", source="rebuttal"),
        comparison.Comparison("b", "accuracy", 0.5, None, 0.01, "X, CPU"),
    ]
    html = comparison.comparison_table(rows)._repr_html_()
    for column in ("paper", "reproduced", "difference", "tolerance", "verdict", "hardware"):
        assert f">{column}</th>" in html
    assert html.count('<th scope="row"') == 2 and html.count('<th scope="col"') == 7
    assert ">+0.020</td>" in html and ">not measured</td>" in html and ">± 0.050</td>" in html

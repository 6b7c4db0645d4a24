"""Columns on a terminal: their alignment, and no blanks at the end of a line."""

from cats.records.text_table import text_table


def test_words_stand_left_and_numbers_right():
    rows = [("dense", "0.5", "-"), ("cats top", "12.25", "+0.1 [0.0, 0.2]")]
    assert text_table(("method", "score", "to dense"), rows).splitlines() == [
        "method    score         to dense",
        "dense       0.5                -",
        "cats top  12.25  +0.1 [0.0, 0.2]",
    ]


def test_a_table_without_rows_is_its_header():
    assert text_table(("method", "task"), []) == "method  task"

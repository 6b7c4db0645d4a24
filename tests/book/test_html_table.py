"""Tables of pages: escaped, captioned, with headers for rows, and reachable by keyboard."""

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from cats.book.html_table import Table
from cats.errors import CatsError


def html(*given, **options) -> BeautifulSoup:
    return BeautifulSoup(Table(*given, **options)._repr_html_(), "lxml")


def test_cells_headers_and_captions_are_escaped_and_missing_values_marked():
    frame = pd.DataFrame({"<i>": ["<b>", "&"], "a<b": [1.23456, None], "text": ["x & y", None]})
    page = html(frame, {"a<b": "{:.2f}"}, caption="<script>")
    assert page.find(["i", "b", "script", "style"]) is None
    assert [cell.text for cell in page.find_all("th", scope="col")] == ["<i>", "a<b", "text"]
    assert [cell.text for cell in page.find_all("th", scope="row")] == ["<b>", "&"]
    assert [cell.text for cell in page.find_all("td")] == ["1.23", "x & y", "–", "–"]
    assert page.caption.text == "<script>" and "1.23" in repr(Table(frame, {"a<b": "{:.2f}"}))


def test_the_box_scrolls_by_keyboard_and_has_the_name_of_the_table():
    frame = pd.DataFrame({"rule": ["cats"], "loss": [1.0]})
    [box] = html(frame, caption="Loss by rule").find_all("div")
    assert box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] == "Loss by rule"
    assert html(frame).find("caption") is None and html(frame).div["aria-label"] == "table"


def test_a_long_table_is_folded_under_its_caption():
    short, long = (pd.DataFrame({"n": [str(n) for n in range(rows)], "v": 1.0}) for rows in (10, 11))
    assert html(short).find("details") is None
    assert html(long, caption="Losses").details.summary.text == "All values: Losses"


def test_rows_and_columns_may_have_the_same_label_and_no_id_repeats():
    page = html(pd.DataFrame({"rule": ["cats", "cats"], "loss": [1.0, 2.0]}))
    assert [row.th.text + row.td.text for row in page.tbody.find_all("tr")] == ["cats1.0", "cats2.0"]
    assert page.find(id=True) is None


def test_numbers_stand_right_and_what_belongs_together_stays_on_one_line():
    frame = pd.DataFrame({
        "rule": ["a", "b"], "score": ["42.2 ± 1.4", None], "change": ["-40.0 [-42.7, -37.1]", None],
        "number": ["-1.5", None], "words": ["cats", None], "long": ["a" * 40, None],
    })  # fmt: skip
    page = html(frame)
    classes = {cell.text: cell.get("class") for cell in page.thead.find_all("th")}
    assert classes["score"] == classes["change"] == ["interval", "short"]
    assert classes["number"] == ["number", "short"] and classes["words"] == ["short"]
    assert classes["long"] is None
    assert [cell.get("class") for cell in page.tbody.tr.find_all("td")] == list(classes.values())[1:]


def test_numbers_have_the_form_of_the_book():
    table = Table(pd.DataFrame({"at 50%": ["-0.0", "-2.5"], "share": [0.5, -0.1]}), {"share": "{:.0%}"})
    assert list(table.frame) == ["at 50\u00a0%", "share"]
    assert table.frame.to_numpy().tolist() == [["0.0", "50\u00a0%"], ["−2.5", "−10\u00a0%"]]


def test_a_format_for_no_column_is_refused():
    with pytest.raises(CatsError, match="no column 'b'"):
        Table(pd.DataFrame({"a": [1]}), {"b": "{}"})

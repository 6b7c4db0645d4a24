import pandas as pd
import pytest

from cats.book.html_table import Table
from cats.errors import CatsError


def test_table_formats_escapes_and_marks_missing_values():
    frame = pd.DataFrame({"a<b": [1.23456, None], "text": ["x & y", None]})
    table = Table(frame, {"a<b": "{:.2f}"})
    html = table._repr_html_()
    assert ">1.23</td>" in html and "a&lt;b" in html and "x &amp; y" in html and html.count(">–</td>") == 2
    assert "1.23" in repr(table)


def test_what_stays_on_one_line_in_a_table():
    frame = pd.DataFrame({
        "score": ["42.2 ± 1.4", None], "change": ["-40.0 [-42.7, -37.1]", None],
        "number": ["1.5", None], "words": ["cats", None], "long": ["a" * 40, None],
    })  # fmt: skip
    html = Table(frame)._repr_html_()
    for name in ("score", "change"):
        assert f'<th scope="col" class="interval short">{name}<' in html
    assert 'class="number short">number<' in html and 'class="short">words<' in html
    assert '<th scope="col">long<' in html


def test_table_refuses_a_format_for_no_column():
    with pytest.raises(CatsError, match="no column 'b'"):
        Table(pd.DataFrame({"a": [1]}), {"b": "{}"})

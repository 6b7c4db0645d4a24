"""Tables as the book shows them: pandas' Styler with formatted numbers, in a box that scrolls sideways."""

import html
import re
from collections.abc import Callable, Mapping

import pandas as pd
from pandas.io.formats.style import Styler

from cats.book.words import tidy
from cats.errors import CatsError

ABSENT = "–"
_NUMBER = re.compile(r"[±+−]? ?[\d.,]+ ?%?|" + ABSENT)
_INTERVAL = re.compile(rf"[+−]?[\d.,]+\s?%?( ± [\d.,]+| \[[^\]]*\])|{ABSENT}")
_SHORT = 28  # characters
_FOLDED = 10  # rows: a longer table is folded


class Table:
    """A DataFrame for display: HTML in a wrapper that scrolls sideways, plain text elsewhere.

    The first column names the rows; a table of more than ten is folded. `formats` maps a column to a format
    string such as "{:.3f}", or to a function of the value; missing values show as a dash. `caption` says what
    the table shows; a screen reader reads it as the name of the scrolling box. Raises CatsError where a
    format names no column.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        formats: Mapping[str, str | Callable] | None = None,
        *,
        caption: str = "",
    ):
        formats = dict(formats or {})
        unknown = [column for column in formats if column not in frame.columns]
        if unknown:
            raise CatsError(
                f"The table has no column {unknown[0]!r}: it has {', '.join(map(str, frame.columns))}."
            )
        self.caption = tidy(caption)
        self.frame = pd.DataFrame(
            {
                tidy(str(column)): [_cell(value, formats.get(column)) for value in frame[column]]
                for column in frame.columns
            }
        )

    def _repr_html_(self) -> str:
        """The first column as headers of the rows; classes say what is right-aligned and what may break."""
        cells = self.frame.iloc[:, 1:]
        classes = {name: _classes(cells[name]) for name in cells}
        styler = Styler(cells, cell_ids=False, escape="html")
        styler.set_td_classes(pd.DataFrame(classes, index=cells.index))
        styler.relabel_index([html.escape(name) for name in self.frame.iloc[:, 0]])
        styler.relabel_index([html.escape(name) for name in cells], axis=1)
        if self.caption:
            styler.set_caption(html.escape(self.caption))
        styler.columns.name = html.escape(self.frame.columns[0])
        table = _plain(styler.to_html(), list(classes.values()))
        label = html.escape(self.caption or "table")
        box = f'<div class="cats-table" role="region" tabindex="0" aria-label="{label}">\n{table}</div>'
        if len(self.frame) <= _FOLDED:
            return box
        return f'<details class="cats-all"><summary>All values: {label}</summary>\n{box}</details>'

    def __repr__(self) -> str:
        table = self.frame.to_string(index=False)
        return f"{self.caption}\n{table}" if self.caption else table


def _cell(value, form: str | Callable | None) -> str:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return ABSENT
    if callable(form):
        return tidy(form(value))
    return tidy(form.format(value) if form else str(value))


def _classes(cells: pd.Series) -> str:
    """Numbers stand right, short cells on one line, and numbers with their error or interval always."""
    names = ["number"] if all(_NUMBER.fullmatch(cell) for cell in cells) else []
    names += ["interval"] if all(_INTERVAL.fullmatch(cell) for cell in cells) else []
    names += ["short"] if all(len(cell) <= _SHORT for cell in cells) else []
    return " ".join(names)


def _plain(table: str, classes: list[str]) -> str:
    """Styler's table with the scope of its headers, and only the classes that the style sheet knows."""

    def column(match: re.Match) -> str:
        return f'<th scope="col" class="{classes[int(match[1])]}"'

    table = re.sub(r"<style.*?</style>\n?", "", table, flags=re.DOTALL)
    table = re.sub(r' id="T_[^"]*"', "", table)
    table = re.sub(r'<th class="index_name [^"]*"', '<th scope="col"', table)
    table = re.sub(r'<th class="row_heading [^"]*"', '<th scope="row"', table)
    table = re.sub(r'<th class="col_heading level0 col(\d+)"', column, table)
    table = re.sub(r'<td class="data row\d+ col\d+ ?', '<td class="', table)
    return table.replace(' class=""', "").replace(" >", ">")

"""Tables as the book shows them: no index, formatted numbers, readable on a narrow screen."""

import re
from collections.abc import Callable, Mapping

import pandas as pd

from cats.errors import CatsError

ABSENT = "–"
_NUMBER = re.compile(r"[±+−-]? ?[\d.,]+ ?%?|" + ABSENT)
_INTERVAL = re.compile(rf"[+−-]?[\d.,]+%?( ± [\d.,]+| \[[^\]]*\])|{ABSENT}")
_SHORT = 28  # characters


class Table:
    """A DataFrame for display: HTML in a wrapper that scrolls sideways, plain text elsewhere.

    `formats` maps a column to a format string such as "{:.3f}", or to a function of the value; missing
    values show as a dash. Raises CatsError where a format names no column.
    """

    def __init__(self, frame: pd.DataFrame, formats: Mapping[str, str | Callable] | None = None):
        formats = dict(formats or {})
        unknown = [column for column in formats if column not in frame.columns]
        if unknown:
            raise CatsError(
                f"The table has no column {unknown[0]!r}: it has {', '.join(map(str, frame.columns))}."
            )
        self.frame = pd.DataFrame(
            {
                column: [_cell(value, formats.get(column)) for value in frame[column]]
                for column in frame.columns
            }
        )
        self._classes = [_class(self.frame[column]) for column in self.frame.columns]

    def _repr_html_(self) -> str:
        head = "".join(
            f'<th scope="col"{self._classes[i]}>{_escape(column)}</th>'
            for i, column in enumerate(self.frame.columns)
        )
        body = "\n".join(
            "<tr>"
            + "".join(f"<td{self._classes[i]}>{_escape(cell)}</td>" for i, cell in enumerate(row))
            + "</tr>"
            for row in self.frame.itertuples(index=False)
        )
        return (
            '<div class="cats-table"><table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
        )

    def __repr__(self) -> str:
        return self.frame.to_string(index=False)


def _cell(value, form: str | Callable | None) -> str:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return ABSENT
    if callable(form):
        return form(value)
    return form.format(value) if form else str(value)


def _class(cells: pd.Series) -> str:
    """Numbers stand right, short cells on one line, and numbers with their error or interval always."""
    names = ["number"] if all(_NUMBER.fullmatch(cell) for cell in cells) else []
    names += ["interval"] if all(_INTERVAL.fullmatch(cell) for cell in cells) else []
    names += ["short"] if all(len(cell) <= _SHORT for cell in cells) else []
    return f' class="{" ".join(names)}"' if names else ""


def _escape(text) -> str:
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

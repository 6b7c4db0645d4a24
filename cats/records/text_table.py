"""Rows as aligned columns for a terminal: numbers to the right, words to the left."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line for the header and for each row; a column of numbers, or of "-", is aligned to the right."""
    columns = []
    for title, *cells in zip(header, *rows, strict=True):
        width = max(len(cell) for cell in [title, *cells])
        numbers = all(cell[:1] in "0123456789+-" for cell in cells)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in [title, *cells]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

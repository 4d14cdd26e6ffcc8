"""Tables as Markdown, as aligned text and as CSV files: the only writer of tables in the package and the benchmarks."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence

from liif_fast.utils.files import write_atomically


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A Markdown table that ends in a newline.

    columns: titles. rows: cells of any type; None is an empty cell, and a `|` in a cell is escaped. align: one letter
    per column, 'l' or 'r'; by default the first column is on the left and all others are on the right.
    Raises ValueError if a row or `align` has another number of columns.
    """
    rules = ["---:" if side == "r" else "---" for side in _sides(columns, align)]
    lines = [[_text(cell).replace("|", "\\|") for cell in line] for line in (columns, *_checked(columns, rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rules, *lines[1:]])


def plain(columns: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """The same table as text for a terminal: columns padded to their widest cell, two spaces between them."""
    sides = _sides(columns, align)
    lines = [[_text(cell) for cell in line] for line in (columns, *_checked(columns, rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [cell.rjust(width) if side == "r" else cell.ljust(width) for cell, width, side in zip(line, widths, sides)]
        for line in lines
    )
    return "".join("  ".join(line).rstrip() + "\n" for line in padded)


def bold(text: str) -> str:
    """A cell in bold type, for `markdown`."""
    return f"**{text}**"


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file with a row of titles; the file is either complete or the previous one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *_checked(columns, rows)])
    write_atomically(path, text.getvalue().encode())


def _sides(columns: Sequence[str], align: str) -> str:
    sides = align or "l" + "r" * (len(columns) - 1)
    if len(sides) != len(columns) or not set(sides) <= {"l", "r"}:
        raise ValueError(f"align is {align!r}; it must be one letter 'l' or 'r' for each of {len(columns)} columns")
    return sides


def _checked(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[Sequence[object]]:
    found = list(rows)
    for row in found:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells, but the table has {len(columns)} columns: {row!r}")
    return found


def _text(cell: object) -> str:
    return "" if cell is None else " ".join(str(cell).split("\n"))

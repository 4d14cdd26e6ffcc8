"""The writer of tables: Markdown, aligned text, CSV."""

import pytest

from liif_fast.utils import tables

COLUMNS = ("method", "x2", "x30")
ROWS = [("bicubic", "31.00", None), ("a|b", 7, tables.bold("9.5"))]


def test_a_table_as_markdown_text_and_csv(tmp_path):
    lines = ["| method | x2 | x30 |", "| --- | ---: | ---: |", "| bicubic | 31.00 |  |", "| a\\|b | 7 | **9.5** |"]
    assert tables.markdown(COLUMNS, ROWS).splitlines() == lines
    assert tables.markdown(COLUMNS, ROWS, "lll").splitlines()[1] == "| --- | --- | --- |"
    assert tables.plain(COLUMNS, ROWS).splitlines() == [
        "method      x2      x30",
        "bicubic  31.00",
        "a|b          7  **9.5**",
    ]
    tables.write_csv(tmp_path / "table.csv", COLUMNS, ROWS)
    assert (tmp_path / "table.csv").read_text() == "method,x2,x30\nbicubic,31.00,\na|b,7,**9.5**\n"


@pytest.mark.parametrize(("rows", "align", "message"), [([("a",)], "", "a row has 1 cells"), ([], "lr", "align is 'l")])
def test_cells_and_sides_must_fit_the_columns(rows, align, message):
    with pytest.raises(ValueError, match=message):
        tables.markdown(COLUMNS, rows, align)

"""Tables in plain text for a terminal, and the format of their numbers."""

from __future__ import annotations

from collections.abc import Sequence

BYTES_PER_MB = 1e6


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], prose: bool = False) -> str:
    """Return an aligned table with a rule below its header.

    Args:
        header: titles of the columns.
        rows: cells, as many in each row as columns.
        prose: whether the cells are words, all flush left, and the last column may be of any width. Otherwise they are
            numbers: the first column is flush left, the others flush right.
    """
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    if prose:
        widths[-1] = len(header[-1])

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if prose or column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def figure(value: float | None) -> str:
    """Return a score with four decimals; a dash for None."""
    return "-" if value is None else f"{value:.4f}"


def megabytes(count: int | None) -> str:
    """Return a number of bytes in MB (1e6 bytes) with two decimals; a dash for None."""
    return "-" if count is None else f"{count / BYTES_PER_MB:.2f}"

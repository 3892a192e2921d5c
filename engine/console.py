"""Text on a terminal or in a pipe: what every command and benchmark prints goes through here."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NEVER_WRAPPED = 14  # characters


def show_table(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: Sequence[str] = ()
) -> None:
    """A table: ruled on a terminal; elsewhere plain columns, never cut, that other programs can read.

    left  columns set to the left; figures stand to the right
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        _show_plain(console, header, cells, title, left)
        return
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, *column in zip(header, *cells, strict=True):
        # On a narrow terminal headings and long texts wrap, figures do not.
        width = min(max(map(len, column), default=0), _NEVER_WRAPPED)
        table.add_column(Text(name), justify="left" if name in left else "right", overflow="fold", min_width=width)
    for row in cells:
        table.add_row(*map(Text, row))  # Text: a user's "[bold]" is not markup
    console.print(table)


def _show_plain(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], title: str, left: Sequence[str]
) -> None:
    if title:
        say(console, title)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        columns = zip(row, widths, header, strict=True)
        aligned = [cell.ljust(width) if name in left else cell.rjust(width) for cell, width, name in columns]
        say(console, "  ".join(aligned).rstrip())


def say(console: Console, text: str = "") -> None:
    """One line as it is: no markup, no wrapping, no highlighting."""
    console.print(Text(text), soft_wrap=True, highlight=False)


def printable(text: str) -> str:
    """``text`` on one line, without control characters (a terminal would obey them)."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

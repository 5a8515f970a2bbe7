"""What is printed: names from data, files and options stand as they are, and give the terminal no orders."""

from __future__ import annotations

from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text


def printable(text: str) -> str:
    """A text with control characters, and all else that does not show, written as escapes; line feeds stay.

    >>> print(printable("caf\\u00e9 \\x1b[31m"))
    café \\x1b[31m
    """
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def plain(text: str, style: str = "") -> Text:
    """A text for rich, in which ``[v2]`` is no style and ``:x:`` no picture."""
    return Text(printable(text), style=style)


def say(text: str, console: Console | None = None) -> None:
    """Print a line as it stands."""
    (console or Console()).print(plain(text), highlight=False, soft_wrap=True)


class PlainTable(Table):
    """A table of rich whose texts all stand as they are, see :func:`plain`; its title is on the left."""

    def __init__(self, title: str = "", **options: Any) -> None:
        shown = plain(title, "table.title") if title else None
        super().__init__(title=shown, title_justify="left", **options)

    def add_column(self, header: RenderableType = "", footer: RenderableType = "", **options: Any) -> None:
        """Add a column; see rich."""
        super().add_column(_as_it_stands(header), _as_it_stands(footer), **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row; see rich."""
        super().add_row(*map(_as_it_stands, cells), **options)


def _as_it_stands(cell: Any) -> Any:
    return plain(cell) if isinstance(cell, str) else cell

"""Tables: headings, cells with text and sort value, notes; shown in a terminal and as Markdown.

`latex` sets them for a paper, `html/page.html.jinja` on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as TerminalTable


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes:
        text: What stands out.
        more: What stands under it, and behind it in Markdown: interval, n.
        notes: What only the page has under that: a difference, a paper's figure.
        sort: What its column is sorted by; None comes last.
        heat: A share that colours it, or None.
        starred: Whether a paper's table marks it as a significant difference.
    """

    text: str = ""
    more: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sort: float | str | None = None
    heat: float | None = None
    starred: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table of models, figures or examples; the first cell of each row heads it.

    On the page it is called `name`; `roles` are the models', where its rows are models.
    """

    name: str
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    legend: str = ""
    roles: Sequence[str] = ()


def terminal() -> Console:
    """A console that fits the terminal, or is wide enough for any table where there is none."""
    from rich.console import Console

    # Brackets are a user's lists, and no markup.
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=200, soft_wrap=True, markup=False)


def as_terminal(table: Table) -> TerminalTable:
    """The table as `rich` prints it, each part of a cell on a line of its own."""
    from rich.table import Table as TerminalTable
    from rich.text import Text

    shown = TerminalTable(title=table.title or None, title_justify="left", header_style="bold")
    for heading in table.headings:
        shown.add_column(Text(heading), overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text("\n".join((cell.text, *cell.more))) for cell in row))
    return shown


def as_markdown(table: Table, escape: Callable[[str], str] = lambda text: text) -> str:
    """The table's lines in Markdown, without title and legend; `escape` makes cells inert."""
    cells = [[" ".join((cell.text, *cell.more)) for cell in row] for row in table.rows]
    head, *lines = (
        "| " + " | ".join(escape(cell).replace("|", "\\|") for cell in line) + " |"
        for line in (table.headings, *cells)
    )
    return "\n".join([head, "|" + " --- |" * len(table.headings), *lines, ""])


def text_cell(text: str) -> Cell:
    """A cell of words, or of a figure with its unit behind it."""
    try:
        return Cell(text, sort=float(text.split()[0]) if text.split() else None)
    except ValueError:
        return Cell(text, sort=None if text == "-" else text)

"""Tables for people: as text, by rich where that is installed, and as HTML for notebooks."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
from collections.abc import Iterable

from lightning_lora.naming import starred


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, and below them labels with a value each."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    below: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    right: tuple[str, ...] = ()
    """The columns whose cells stand at the right."""

    def print(self) -> None:
        """Print a rich table where rich is installed, else a plain one."""
        if has_rich():
            self._print_rich()
        else:
            print(self.plain())

    def plain(self) -> str:
        """Return the table as text."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(row: tuple[str, ...]) -> str:
            cells = zip(self.header, row, widths, strict=True)
            return " | ".join(
                cell.rjust(width) if column in self.right else cell.ljust(width) for column, cell, width in cells
            ).rstrip()

        rule = "-" * (sum(widths) + 3 * len(widths))
        width = max((len(label) for label, _ in self.below), default=0)
        below = [f"{label.ljust(width)}  {value}" for label, value in self.below]
        return "\n".join([line(self.header), rule, *map(line, self.rows), *([rule, *below] if below else ())])

    def html(self) -> str:
        """Return the table as HTML. What stands in cells is text: names that look like tags are shown as they are."""

        def line(cells: tuple[str, ...], tag: str) -> str:
            sides = ("right" if column in self.right else "left" for column in self.header)
            inside = (
                f'<{tag} style="text-align: {side}">{html.escape(cell.strip())}</{tag}>'
                for side, cell in zip(sides, cells, strict=True)
            )
            return f"<tr>{''.join(inside)}</tr>"

        rows = "\n".join(line(row, "td") for row in self.rows)
        below = "".join(f"<div>{html.escape(f'{label}: {value}')}</div>\n" for label, value in self.below)
        return f"<table>\n<thead>{line(self.header, 'th')}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n{below}"

    def _print_rich(self) -> None:
        from rich import get_console
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(header_style="bold magenta")
        for column in self.header:
            table.add_column(column, justify="right" if column in self.right else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        grid = RichTable.grid(padding=(0, 2))
        for label, value in self.below:
            grid.add_row(f"[bold]{escape(label)}[/]", escape(value))
        get_console().print(table)
        get_console().print(grid)


def rows_of_alike(
    members: Iterable[tuple[str, tuple[str, ...], int]],
) -> list[tuple[tuple[str, ...], int]]:
    """Put members whose names differ in numbers only, and whose cells are equal, into one row.

    Args:
        members: The name, the cells and the size of each.

    Returns:
        For each row its cells, the name, with stars for the numbers, and the count of the members first, and the sum of
        their sizes.
    """
    groups: dict[tuple[str, ...], dict[str, int]] = {}
    for name, cells, size in members:
        groups.setdefault((starred(name), *cells), {})[name] = size
    return [
        ((stars if len(sizes) > 1 else next(iter(sizes)), str(len(sizes)), *cells), sum(sizes.values()))
        for (stars, *cells), sizes in groups.items()
    ]


def has_rich() -> bool:
    """Return whether rich is installed."""
    return importlib.util.find_spec("rich") is not None

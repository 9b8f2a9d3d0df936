"""A table for people, by rich where that is installed."""

from __future__ import annotations

import dataclasses
import importlib.util


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, and below them labels with a value each."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    below: list[tuple[str, str]]
    right: tuple[str, ...] = ()
    """The columns whose cells stand at the right."""

    def print(self) -> None:
        """Print a rich table where rich is installed, else a plain one."""
        if has_rich():
            self._print_rich()
        else:
            print(self.plain())

    def plain(self) -> str:
        """Text."""
        widths = [max(len(row[column]) for row in (self.header, *self.rows)) for column in range(len(self.header))]

        def line(row: tuple[str, ...]) -> str:
            cells = zip(self.header, row, widths, strict=True)
            return " | ".join(
                cell.rjust(width) if column in self.right else cell.ljust(width) for column, cell, width in cells
            ).rstrip()

        rule = "-" * (sum(widths) + 3 * len(widths))
        width = max(len(label) for label, _ in self.below)
        below = (f"{label.ljust(width)}  {value}" for label, value in self.below)
        return "\n".join([line(self.header), rule, *map(line, self.rows), rule, *below])

    def _print_rich(self) -> None:
        from rich import get_console
        from rich.table import Table as RichTable

        table = RichTable(header_style="bold magenta")
        for column in self.header:
            table.add_column(column, justify="right" if column in self.right else "left")
        for row in self.rows:
            table.add_row(*row)
        grid = RichTable.grid(padding=(0, 2))
        for label, value in self.below:
            grid.add_row(f"[bold]{label}[/]", value)
        get_console().print(table)
        get_console().print(grid)


def has_rich() -> bool:
    """Return whether rich is installed."""
    return importlib.util.find_spec("rich") is not None

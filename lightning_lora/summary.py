"""The table that is printed when training starts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from lightning_utilities.core.imports import RequirementCache
from torch import nn

from lightning_lora.inject import adapters, places

log = logging.getLogger(__name__)

HEADER = ("Adapted modules", "Count", "Type", "Weight", "Rank", "Params")


def print_summary(module: nn.Module) -> None:
    """Prints what is adapted in ``module`` and how much of it is trained; a rich table where rich is installed."""
    rows, totals = _rows(module), _totals(module)
    if RequirementCache("rich"):
        _print_rich(rows, totals)
    else:
        log.info("\n" + _plain(rows, totals))


def _rows(module: nn.Module) -> list[tuple[str, ...]]:
    """One row for all adapted modules whose names differ in numbers only and whose adapters are alike."""
    groups: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for place in {id(place.adapter): place for place in places(module)}.values():
        adapter = place.adapter
        weight = " x ".join(map(str, place.weight.shape))
        group = _starred(place.name), type(place.host).__name__, weight, str(adapter.rank)
        groups.setdefault(group, []).append((place.name, adapter.A.numel() + adapter.B.numel()))
    return [
        (
            starred if len(members) > 1 else members[0][0],
            str(len(members)),
            kind,
            weight,
            rank,
            _count(sum(size for _, size in members)),
        )
        for (starred, kind, weight, rank), members in groups.items()
    ]


def _starred(name: str) -> str:
    """``name`` with a star for each part that is a number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _totals(module: nn.Module) -> list[tuple[str, str]]:
    factors = {id(p) for adapter in adapters(module).values() for p in adapter.parameters()}
    base = {name: p for name, p in module.named_parameters() if id(p) not in factors}
    in_adapters = sum(p.numel() for p in module.parameters() if id(p) in factors)
    besides = sum(p.numel() for p in base.values() if p.requires_grad)
    total = sum(p.numel() for p in base.values())
    return [
        ("Trainable params", f"{_count(in_adapters + besides)} ({(in_adapters + besides) / total:.2%} of the model's)"),
        ("  in adapters", _count(in_adapters)),
        ("  besides", f"{_count(besides)}{_owners(name for name, p in base.items() if p.requires_grad)}"),
        ("Params of the model", _count(total)),
    ]


def _owners(names: Iterable[str], most: int = 4) -> str:
    grouped = list(dict.fromkeys(map(_starred, names)))
    more = f", and {len(grouped) - most} more" if len(grouped) > most else ""
    return f" ({', '.join(grouped[:most])}{more})" if grouped else ""


def _count(number: int) -> str:
    return get_human_readable_count(number).strip()


def _plain(rows: list[tuple[str, ...]], totals: list[tuple[str, str]]) -> str:
    widths = [max(len(row[column]) for row in (HEADER, *rows)) for column in range(len(HEADER))]

    def line(row: tuple[str, ...]) -> str:
        return " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    rule = "-" * (sum(widths) + 3 * len(widths))
    width = max(len(label) for label, _ in totals)
    return "\n".join(
        [line(HEADER), rule, *map(line, rows), rule, *(f"{label.ljust(width)}  {value}" for label, value in totals)]
    )


def _print_rich(rows: list[tuple[str, ...]], totals: list[tuple[str, str]]) -> None:
    from rich import get_console
    from rich.table import Table

    table = Table(header_style="bold magenta")
    for column in HEADER:
        table.add_column(column, justify="right" if column in ("Count", "Rank", "Params") else "left")
    for row in rows:
        table.add_row(*row)
    grid = Table.grid(padding=(0, 2))
    for label, value in totals:
        grid.add_row(f"[bold]{label}[/]", value)
    get_console().print(table)
    get_console().print(grid)

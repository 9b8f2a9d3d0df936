"""The table that is printed when training starts: what is adapted, and what was left out."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from torch import nn

from lightning_lora.adapters import Adapter
from lightning_lora.injection.inject import Injection, adapters, distinct_places, injections
from lightning_lora.injection.targets import summary
from lightning_lora.naming import plain_name, starred
from lightning_lora.table import Table, rows_of_alike
from lightning_lora.weights.quantized import numel


def print_summary(module: nn.Module) -> None:
    """Print what is adapted in ``module`` and how much of it is trained; a rich table where rich is installed."""
    header = ("Adapted modules", "Count", "Type", "Weight", "Rank", "Params")
    Table(header, _rows(module), _totals(module), right=("Count", "Rank", "Params")).print()


def _rows(module: nn.Module) -> list[tuple[str, ...]]:
    """One row for all adapted modules whose names differ in numbers only and whose adapters are alike."""
    asked = _ranks_asked_for(module)
    rows = rows_of_alike(
        (
            place.name,
            (
                type(place.host).__name__,
                " x ".join(map(str, place.adapter.shape)),
                _rank(place.adapter, asked.get(place.name, 0)),
            ),
            sum(p.numel() for p in place.adapter.trained.values()),
        )
        for place in distinct_places(module)
    )
    return [(*cells, _count(size)) for cells, size in rows]


def _ranks_asked_for(module: nn.Module) -> dict[str, int]:
    """Name of an adapter -> the rank that the options give to it."""
    asked = {}
    for path, owner in module.named_modules():
        if isinstance(injection := owner.__dict__.get("lora_injection"), Injection):
            for name, rank in injection.asked.items():
                asked[f"{plain_name(path)}.{name}".lstrip(".")] = rank
    return asked


def _rank(adapter: Adapter, asked: int) -> str:
    """Return the adapter's rank, and why it is lower than the one asked for."""
    full = min(adapter.A.shape[-1], adapter.B.shape[-1])
    why = "" if adapter.rank >= asked else " (full)" if adapter.rank == full else f" (not {asked})"
    return f"{adapter.rank}{why}"


def _is_no_smaller(adapter: Adapter) -> bool:
    """Return whether A and B have at least as many entries as the weight: r (m + n) >= m n."""
    m, n = adapter.B.shape[-1], adapter.A.shape[-1]
    return adapter.rank * (m + n) >= m * n


def _totals(module: nn.Module) -> list[tuple[str, str]]:
    factors = {id(p) for adapter in adapters(module).values() for p in adapter.parameters()}
    base = {name: p for name, p in module.named_parameters() if id(p) not in factors}
    in_adapters = sum(p.numel() for adapter in adapters(module).values() for p in adapter.trained.values())
    besides = sum(p.numel() for p in base.values() if p.requires_grad)
    total = sum(map(numel, base.values()))
    large = [name for name, adapter in adapters(module).items() if _is_no_smaller(adapter)]
    left_out = [layer for injection in injections(module) for layer in injection.left_out]
    rows = [
        ("Trainable params", f"{_count(in_adapters + besides)} ({(in_adapters + besides) / total:.2%} of the model's)"),
        ("  in adapters", _count(in_adapters)),
        ("  besides", f"{_count(besides)}{_owners(name for name, p in base.items() if p.requires_grad)}"),
        ("Params of the model", _count(total)),
        (
            "No smaller than their weights",
            f"{len(large)} adapter{'s' * (len(large) > 1)}{_owners(large)}" if large else "",
        ),
        ("Left out", summary(left_out)),
    ]
    return [(label, value) for label, value in rows if value]


def _owners(names: Iterable[str], most: int = 4) -> str:
    grouped = list(dict.fromkeys(map(starred, names)))
    more = f", and {len(grouped) - most} more" if len(grouped) > most else ""
    return f" ({', '.join(grouped[:most])}{more})" if grouped else ""


def _count(number: int) -> str:
    return get_human_readable_count(number).strip()

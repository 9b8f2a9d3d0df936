"""The adapters of a module by their names, as :func:`~lightning_lora.adapters` returns them."""

from __future__ import annotations

from lightning_lora.adapters.adapter import Adapter
from lightning_lora.table import Table, rows_of_alike


class NamedAdapters(dict[str, Adapter]):
    """A dictionary of adapters that is shown as a table: names that differ in numbers only share a row."""

    def table(self) -> Table:
        """Return what the adapters are, and how many of their numbers are trained."""
        rows = rows_of_alike(
            (
                name,
                (adapter.decomposition, " x ".join(map(str, adapter.shape)), str(adapter.rank)),
                sum(p.numel() for p in adapter.trained.values()),
            )
            for name, adapter in self.items()
        )
        header = ("Adapters", "Count", "Decomposition", "Weight", "Rank", "Params")
        return Table(header, [(*cells, f"{size:,}") for cells, size in rows], right=("Count", "Rank", "Params"))

    def __repr__(self) -> str:
        return self.table().plain() if self else "no adapters"

    def _repr_html_(self) -> str:
        return self.table().html()

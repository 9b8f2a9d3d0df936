"""The four parts of the memory of training, of a run and of full fine-tuning in its place.

They are those of the article (https://kexue.fm/archives/9590): parameters, gradients, optimizer states, activations.
What can be read off the run is measured. The rest is derived from steps that cost next to nothing: one of the plain
module without data (:mod:`~lightning_lora.memory.activations`) and one of the same optimizer on small parameters
(:mod:`~lightning_lora.memory.optimizer_states`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_lora.table import Table

PARTS = ("parameters", "gradients", "optimizer", "activations")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""Of the parts, from Okabe and Ito's, which colour-blind readers tell apart."""
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Memory:
    """The four parts in bytes, for one process. None stands for what could not be told."""

    parameters: int
    """Of the module, trained or not, a shared one once. Buffers, the same in any case, are in no part."""
    gradients: int
    """Standing when the optimizer steps, and with ``gradient="projected"`` the largest one that stands before it is
    projected."""
    optimizer: int | None
    """The tensors in ``optimizer.state``."""
    activations: int | None
    """What autograd keeps from the forward to the backward of one batch, but for parameters and buffers."""
    communicated: int = 0
    """Gradients that are reduced over the processes for each optimizer step, which is in none of the parts."""
    derived: frozenset[str] = frozenset()
    """The parts that are derived."""

    @property
    def total(self) -> int:
        """The sum of the parts that could be told."""
        return sum(getattr(self, part) or 0 for part in PARTS)

    def source(self, part: str) -> str:
        """``"measured"``, ``"derived"`` or ``"unknown"``."""
        if getattr(self, part) is None:
            return "unknown"
        return "derived" if part in self.derived else "measured"

    def __sub__(self, other: Memory) -> Memory:
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in (*PARTS, "communicated")}
        differences: dict[str, Any] = {
            name: None if None in pair else pair[0] - pair[1] for name, pair in pairs.items()
        }
        return Memory(**differences, derived=self.derived | other.derived)


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What training holds, and what full fine-tuning of the same module with the same optimizer would.

    Full fine-tuning trains what the module would train if there were no adapters.
    """

    lora: Memory
    full: Memory
    peak: int | None = None
    """The most bytes in use at once, until the first optimizer step was over: on an accelerator those that its
    allocator had given out; on a CPU those of the process that were resident, whatever they were. None before training.
    """
    notes: tuple[str, ...] = ()
    """What had to be assumed."""

    @property
    def saved(self) -> Memory:
        """``full`` less ``lora``."""
        return self.full - self.lora

    def metrics(self) -> dict[str, float]:
        """MiB by the names that loggers get: ``lora/memory/activations``, ``lora/memory_full/activations``, ..."""
        sizes = {
            f"lora/{name}/{part}": getattr(memory, part)
            for name, memory in (("memory", self.lora), ("memory_full", self.full))
            for part in (*PARTS, "total", "communicated")
        }
        sizes["lora/memory/peak"] = self.peak
        if not self.full.communicated:
            sizes = {name: size for name, size in sizes.items() if not name.endswith("communicated")}
        return {name: size / MIB for name, size in sizes.items() if size is not None}

    def table(self) -> Table:
        """One row for each part, in units for people."""
        columns = {"LoRA": self.lora, "Full fine-tuning": self.full, "Saved": self.saved}
        rows = [(part.capitalize(), *(_cell(memory, part) for memory in columns.values())) for part in PARTS]
        rows.append(("Total", *(_cell(memory, "total") for memory in columns.values())))
        below = [("*", "derived, not measured")]
        if self.full.communicated:
            sent, full = _human(self.lora.communicated), _human(self.full.communicated)
            below.append(("Gradients reduced in a step", f"{sent}, in full fine-tuning {full}"))
        if self.peak is not None:
            below.append(("Peak of this process", _human(self.peak)))
        below += [("Note", note) for note in self.notes]
        return Table(("Memory", *columns), rows, below, right=tuple(columns))

    def __str__(self) -> str:
        """Return the table."""
        return self.table().plain()

    def _repr_html_(self) -> str:
        return self.table().html()

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draws full fine-tuning and LoRA as two stacked bars.

        Args:
            ax: Matplotlib axes to draw into; by default those of a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`plot` needs matplotlib: python -m pip install 'lightning-lora[plot]'"
            ) from error
        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        bottom = [0.0, 0.0]
        for part, colour in zip(PARTS, COLOURS, strict=True):
            heights = [(getattr(memory, part) or 0) / MIB for memory in (self.full, self.lora)]
            ax.bar(["full fine-tuning", "LoRA"], heights, bottom=bottom, color=colour, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        ax.set_ylabel("MiB")
        ax.legend(frameon=False)
        return ax.get_figure(), ax


def _cell(memory: Memory, part: str) -> str:
    size = getattr(memory, part)
    derived = part in memory.derived or (part == "total" and memory.derived)
    return "unknown " if size is None else f"{_human(size)}{'*' if derived else ' '}"


def _human(size: float) -> str:
    """Write bytes in the unit that leaves one to four digits before the point."""
    power = min(max(abs(int(size)).bit_length() - 1, 0) // 10, 3)
    return f"{size / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"

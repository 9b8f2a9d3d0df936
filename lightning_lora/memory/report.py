"""The four parts of the memory of training, of a run and of full fine-tuning in its place.

They are those of the article (https://kexue.fm/archives/9590): parameters, gradients, optimizer states, activations.
What can be read off the run is measured. The rest is derived from steps that cost next to nothing: one of the plain
module without data (:mod:`~lightning_lora.memory.activations`) and one of the same optimizer on small parameters
(:mod:`~lightning_lora.memory.optimizer_states`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_lora.hosts import ParameterHost
from lightning_lora.injection.inject import inject_options, places, trained_without
from lightning_lora.injection.options import Options
from lightning_lora.memory.activations import Activations, dry_run, hollow, nbytes, new_mode, watch_step
from lightning_lora.memory.optimizer_states import Owner, derived_nbytes, makes_states, measured_nbytes, owners
from lightning_lora.trainer.tables import Table
from lightning_lora.weights import sharded as shards
from lightning_lora.weights.quantized import storages

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
        """The table."""
        return self.table().plain()

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
    """Bytes in the unit that leaves one to four digits before the point."""
    power = min(max(abs(int(size)).bit_length() - 1, 0) // 10, 3)
    return f"{size / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


# --------------------------------------------------------------------------------------------------------- in a run


class MemoryMeter:
    """Reads the memory of a run in its first batch and in the batch of its first real optimizer step.

    Args:
        module: With adapters, about to be trained. Its ``training_step`` is replaced until it has been called once.
        optimizers: Those of the run. A step that a GradScaler skips is none.
        processes: How many processes reduce their gradients.
    """

    def __init__(self, module: LightningModule, optimizers: list[Optimizer], processes: int = 1) -> None:
        self.report: MemoryReport | None = None
        """What was read; from the first real step on."""
        self._module = module
        self._optimizers = optimizers
        self._processes = processes
        self._activations = Activations()
        self._gradients = self._reduced = 0
        self._stepped: set[Optimizer] = set()
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        self._own_step = vars(module).get("training_step")
        vars(module)["training_step"] = functools.update_wrapper(
            functools.partial(self._first_step), module.training_step
        )

    def remove(self) -> None:
        """Takes everything off the module and the optimizers."""
        self.restore_step(vars(self._module))
        for hook in self._hooks:
            hook.remove()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if shards.is_sharded(self._module) and makes_states(optimizer):
            return
        shards.reshard(self._module)
        self._stepped.add(optimizer)
        standing = [p.grad for p in self._module.parameters() if p.grad is not None]
        self._gradients = max(self._gradients, nbytes(standing))
        self._reduced = max(self._reduced, _whole_nbytes(standing))
        self.report = self._read()

    def _read(self) -> MemoryReport:
        shards.reshard(self._module)
        known = owners(self._optimizers)
        for place in places(self._module):  # the optimizer of its adapter would have the weight
            known.setdefault(place.weight, next(known[p] for p in place.adapter.trained.values() if p in known))
        default = next(iter(known.values()))
        trainable = trained_without(self._module)
        reached = trainable.keys() if self._activations.reached is None else self._activations.reached
        trained = [p for name, p in trainable.items() if name in reached]
        state, derived = self._lora_state(known)
        projected = _standing_gradient(self._module)
        lora = Memory(
            parameters=nbytes([*self._module.parameters(), *_scales(self._module)]),
            gradients=self._gradients + projected,
            optimizer=state,
            activations=self._activations.lora,
            communicated=self._reduced if self._processes > 1 else 0,
            derived=frozenset(["gradients"] * bool(projected) + ["optimizer"] * derived),
        )
        full = Memory(
            parameters=nbytes([*_base(self._module), *_scales(self._module)]),
            gradients=nbytes(trained),
            optimizer=derived_nbytes((p, known.get(p, default)) for p in trained),
            activations=self._activations.full,
            communicated=_whole_nbytes(trained) if self._processes > 1 else 0,
            derived=frozenset({"gradients", "optimizer", "activations"}),
        )
        note = self._activations.note
        return MemoryReport(lora, full, _peak(next(self._module.parameters()).device), (note,) if note else ())

    def _lora_state(self, known: dict[Tensor, Owner]) -> tuple[int | None, bool]:
        """Bytes of the optimizers' states, and whether they are derived, as where one optimizer has yet to step."""
        if self._stepped.issuperset(self._optimizers):
            return measured_nbytes(self._optimizers), False
        return derived_nbytes((p, owner) for p, owner in known.items() if p.requires_grad), True

    def restore_step(self, attributes: dict[str, Any]) -> None:
        """Takes itself off ``attributes``, those of the module or of a copy."""
        attributes.pop("training_step", None)
        if self._own_step is not None:
            attributes["training_step"] = self._own_step

    def _first_step(self, *args: Any, **kwargs: Any) -> Any:
        self.restore_step(vars(self._module))
        self._activations, output = watch_step(self._module, len(self._optimizers), args, kwargs)
        if self._stepped:  # in manual optimization, by now
            self.report = self._read()
        return output


def _base(module: nn.Module) -> Iterator[nn.Parameter]:
    factors = {p for place in places(module) for p in place.adapter.parameters()}
    return (p for p in module.parameters() if p not in factors)


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """What is stored of quantised weights; the scales among it are no parameters."""
    return (tensor for stored in storages(module).values() for tensor in stored.tensors())


def _standing_gradient(module: nn.Module) -> int:
    """Bytes of the largest gradient of a weight that stands until it is projected, of a sharded one the whole."""
    by_parameter = (place.weight for place in places(module) if isinstance(place.host, ParameterHost))
    return max((_whole_nbytes([weight]) for weight in by_parameter), default=0)


def _whole_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of ``tensors``, with the parts that other processes hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak(device: torch.device) -> int | None:
    if device.type != "cpu":
        statistics = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return None if statistics is None else statistics(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows has none
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------- before training


def estimate_memory(
    module: nn.Module,
    batch: Any = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    **options: Any,
) -> MemoryReport:
    """The report of a run before it is run, and before its model has memory: ``module`` may be on the meta device.

    Args:
        module: Without adapters. It is left as it is, and no tensor of its size is made. Call this under the
            ``torch.autocast`` under which it will train, if any.
        batch: What ``training_step`` will get; for a module that is no LightningModule, what its forward takes. By
            default ``module.example_input_array``, for the forward.
        optimizer: Makes an optimizer of a list of parameters. By default what ``configure_optimizers`` returns, if
            there is one that can be called without a Trainer, else :class:`torch.optim.AdamW`.
        **options: Those of :func:`~lightning_lora.inject`.

    Returns:
        A report of which all is derived.

    Raises:
        ValueError: If there is neither ``batch`` nor ``example_input_array``, or an option has a bad value.
        Exception: Whatever the module raises where it needs the values of its activations.
    """
    mode = new_mode()
    full, lora = hollow(module, mode), hollow(module, mode)
    with mode:
        inject_options(lora, Options(**options))
    optimizers = {side: _optimizers(side, optimizer) for side in (full, lora)}
    notes = () if all(made for made in optimizers.values()) else ("no optimizer could be configured: AdamW",)

    def memory(side: nn.Module) -> Memory:
        made = optimizers[side] or [AdamW([p for p in side.parameters() if p.requires_grad])]
        activations, reached = dry_run(side, len(made), *_call(side, batch))
        trained = [p for name, p in side.named_parameters() if name in reached]
        known = owners(made)
        return Memory(
            parameters=nbytes(side.parameters()),
            gradients=nbytes(trained) + _standing_gradient(side),
            optimizer=derived_nbytes((p, known[p]) for p in trained if p in known),
            activations=activations,
            derived=frozenset(PARTS),
        )

    return MemoryReport(memory(lora), memory(full), notes=notes)


def _call(module: Any, batch: Any) -> tuple[Any, ...]:
    """What a step of ``module`` calls, and with what."""
    device = next(module.parameters()).device
    if batch is not None:
        batch = move_data_to_device(copy.deepcopy(batch), device)
        if isinstance(module, LightningModule):
            return functools.partial(module.training_step, batch), 0
    else:
        batch = move_data_to_device(getattr(module, "example_input_array", None), device)
        if batch is None:
            raise ValueError(f"{type(module).__name__} has no `example_input_array`: give `estimate_memory` a batch.")
    if isinstance(batch, dict):
        return (functools.partial(module, **batch),)
    return (module, *batch) if isinstance(batch, list | tuple) else (module, batch)


def _optimizers(module: nn.Module, make: Callable[[list[nn.Parameter]], Optimizer] | None) -> list[Optimizer]:
    """Those that train ``module``; none if that cannot be told."""
    if make is not None:
        return [make([p for p in module.parameters() if p.requires_grad])]
    try:
        return list(_found(module.configure_optimizers()))  # type: ignore[operator]
    except Exception:  # there is no such method, or it needs a Trainer
        return []


def _found(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in any of the forms in which ``configure_optimizers`` returns them."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from _found(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from _found(item)

"""Reads the memory of a run in its first batch and at its first optimizer step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lora.injection.inject import places, trained_without
from lightning_lora.memory.activations import Watch, parameters
from lightning_lora.memory.optimizer_states import Owner, derived_nbytes, measured_nbytes, owners
from lightning_lora.memory.report import Memory, MemoryReport
from lightning_lora.memory.saved import nbytes
from lightning_lora.weights import read_only_weights
from lightning_lora.weights.sharded import makes_states, reshard


class MemoryMeter:
    """Reads the memory of a run in its first batch and in the batch of its first real optimizer step.

    Call :meth:`begin_batch` before and :meth:`end_batch` after each ``training_step`` and its backward, until there is
    a :attr:`report`; and then, or when the run ends in any way, :meth:`remove`.

    Args:
        module: With adapters, about to be trained.
        optimizers: Those of the run. A step that a GradScaler skips is none.
        processes: How many processes reduce their gradients.
        full: Weight -> the optimizer and the group that full fine-tuning would give it to, where that is known.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: list[Optimizer],
        processes: int = 1,
        full: Mapping[Tensor, Owner] | None = None,
    ) -> None:
        self.report: MemoryReport | None = None
        """What was read; from the end of the batch of the first real step on."""
        self._module, self._optimizers, self._processes = module, optimizers, processes
        self._full = dict(full or {})
        self._watch: Watch | None = None
        self._gradients = self._reduced = 0
        self._stepped: set[Optimizer] = set()
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def begin_batch(self, batch: Any = None) -> None:
        """Watch what is saved for the backward from here on, if no batch has saved anything yet."""
        if self._watch is None or not (self._watch.blind or self._watch.lora.most):
            manual = not getattr(self._module, "automatic_optimization", True)
            self._watch = Watch(self._module, set(trained_without(self._module).values()), batch, manual)
            self._watch.begin()

    def end_batch(self) -> None:
        """Leave everything as it was, and make the report if an optimizer has taken a step."""
        if self._watch is not None:
            self._watch.end()
        if self._stepped and self.report is None:
            self.report = self._read()

    def remove(self) -> None:
        """Leave everything as it was, and forget the run."""
        if self._watch is not None:
            self._watch.end()
        for hook in self._hooks:
            hook.remove()
        self._watch, self._optimizers, self._hooks, self._full = None, [], [], {}
        self._stepped.clear()
        del self._module

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if makes_states(optimizer):
            return
        reshard(self._module)
        self._stepped.add(optimizer)
        standing = [p.grad for p in parameters(self._module) if p.grad is not None]
        self._gradients = max(self._gradients, nbytes(standing))
        self._reduced = max(self._reduced, _full_nbytes(standing))

    def _read(self) -> MemoryReport:
        module, watch = self._module, self._watch
        assert watch is not None, "an optimizer has stepped before the first batch"
        own = owners(self._optimizers)
        known = own | self._full
        default = next(iter(own.values()))
        for place in places(module):  # the optimizer of its adapter would have the weight
            owner = next((own[p] for p in place.adapter.trained.values() if p in own), default)
            known.setdefault(place.weight, owner)
        trained = [p for p in trained_without(module).values() if not is_lazy(p)]
        if watch.reached and not watch.unknown:
            trained = [p for p in trained if p in watch.reached]
        state: int | None = measured_nbytes(self._optimizers)
        derived = set()
        if not self._stepped.issuperset(self._optimizers):
            state = derived_nbytes((p, owner) for p, owner in own.items() if p.requires_grad)
            derived.add("optimizer")
        if projected := standing_gradient(module):
            derived.add("gradients")
        factors = {p for place in places(module) for p in place.adapter.parameters()}
        stored = [tensor for storage in read_only_weights(module).values() for tensor in storage.tensors()]
        note = watch.blind or (watch.unknown and f"Activations of full fine-tuning: {watch.unknown}")
        return MemoryReport(
            Memory(
                parameters=nbytes([*parameters(module), *stored]),
                gradients=self._gradients + projected,
                optimizer=state,
                activations=None if watch.blind else watch.lora.most,
                communicated=self._reduced if self._processes > 1 else 0,
                derived=frozenset(derived),
            ),
            Memory(
                parameters=nbytes([*(p for p in module.parameters() if p not in factors), *stored]),
                gradients=nbytes(trained),
                optimizer=derived_nbytes((p, known.get(p, default)) for p in trained),
                activations=None if watch.unknown else watch.full.most,
                communicated=_full_nbytes(trained) if self._processes > 1 else 0,
                derived=frozenset({"gradients", "optimizer", "activations"}),
            ),
            _peak(next(module.parameters()).device),
            (note,) if note else (),
        )


def standing_gradient(module: nn.Module) -> int:
    """Return the bytes of the largest gradient of a weight that stands until it is projected."""
    by_parameter = (place.weight for place in places(module) if not place.host.is_exact)
    return max((_full_nbytes([weight]) for weight in by_parameter), default=0)


def _full_nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of ``tensors``, with the shards of other processes."""
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

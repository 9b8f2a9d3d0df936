"""Looks, from batch to batch, for what goes wrong in silence while a module trains, and says what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lora.errors import LoRAError, listed, warn
from lightning_lora.injection.inject import adapters, places
from lightning_lora.trainer import support
from lightning_lora.trainer.author_view import frozen_weights
from lightning_lora.trainer.optimizers import Substitution
from lightning_lora.weights import storage_of
from lightning_lora.weights.digest import seen


class Watch:
    """Watches the adapters, and the weights without one, of a module that trains.

    Args:
        module: With its adapters, as training begins.
        optimizers: Of the run.
        substitutions: Of adapters for weights in these optimizers; weights that are unfrozen are put back there.
        idle: Names of adapters that no optimizer trains.
        reads_frozen: Whether to look, in the first batch, for writes to weights that no optimizer has.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        substitutions: Sequence[Substitution],
        idle: Iterable[str],
        reads_frozen: bool,
    ) -> None:
        self.batches = 0
        """How many training batches have ended."""
        self._optimizers = optimizers
        self._substitutions = substitutions
        adapted = {place.weight: place.name for place in places(module)}
        self._adapted = adapted
        """Adapted weights, with the names of their adapters."""
        self._unfreezable = {p: name for p, name in frozen_weights(module).items() if p not in adapted}
        """Frozen weights without an adapter, which the module's own code may unfreeze."""
        self._adapters = adapters(module)
        self._holding = [adapter for adapter in self._adapters.values() if adapter.holds]
        self._drawn = [adapter for adapter in self._adapters.values() if adapter.resample is not None]
        self._unreached = {name: adapter.versions() for name, adapter in self._adapters.items() if name not in idle}
        """Adapters that no gradient has reached in the first batch, with their versions before it."""
        self._frozen = {name: seen(p) for name, p in self._untrained(module).items()} if reads_frozen else {}
        """What is seen of weights that no optimizer has, before the first batch."""

    def begin_batch(self, module: nn.Module) -> None:
        """Follow what the module's own code has unfrozen, and look at what it has written.

        Raises:
            LoRAError: If an adapted weight requires a gradient now, or A or B was written and its weight, which holds
                the increment, did not follow.
        """
        self._follow_unfrozen()
        self.check_followed()
        if self.batches == 1:
            self._tell_written(module)

    def gradients_arrived(self) -> None:
        """Strike out, until the first batch is over, the adapters that a gradient has reached."""
        if self._unreached:
            self._unreached = {
                name: versions
                for name, versions in self._unreached.items()
                if all(p.grad is None for p in self._adapters[name].trained.values())
            }

    def end_batch(self) -> None:
        """Name the adapters that no gradient has reached in the first batch."""
        self.batches += 1
        self.gradients_arrived()
        unreached, self._unreached = self._unreached, {}
        for name in list(unreached):  # an optimizer that the module called by itself may have stepped, and cleared
            adapter = self._adapters[name]
            if adapter.resample is None and adapter.versions() != unreached[name]:
                del unreached[name]
        if unreached:
            warn(support.unreached(sorted(unreached)))

    def check_followed(self) -> None:
        """Raise if A or B was written by other code than an optimizer's step, and the weight did not follow.

        Raises:
            LoRAError: If so; with what to do.
        """
        for adapter in self._holding:
            adapter.check_followed()

    def give_up_followed(self) -> LoRAError | None:
        """Leave the weights without what other code has written to A and B, and return the error that says so."""
        try:
            self.check_followed()
        except LoRAError as error:
            for adapter in self._holding:
                adapter.set_followed()
            return error
        return None

    def lost_to_rounding(self) -> Tensor | None:
        """Return the share of moved entries that rounding to the nearest would have lost, where factors are drawn."""
        lost = [adapter.lost for adapter in self._drawn if adapter.lost is not None]
        return torch.stack(lost).mean() if lost else None

    def _follow_unfrozen(self) -> None:
        for weight, name in self._adapted.items():
            if weight.requires_grad:
                raise LoRAError(support.unfrozen(name))
        if thawed := [p for p in self._unfreezable if p.requires_grad]:
            for p in thawed:
                del self._unfreezable[p]
            for substitution in self._substitutions:
                substitution.put_back(thawed)

    def _untrained(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the parameters that no optimizer of the run may write."""
        trained: set[Any] = {p for optimizer in self._optimizers for g in optimizer.param_groups for p in g["params"]}
        trained |= {p for adapter in self._adapters.values() for p in adapter.parameters()}
        for child in module.modules():
            if storage_of(child).read_only:  # bitsandbytes casts the biases of its layers in their forward
                trained |= set(child.parameters(recurse=False))
        others = {name: p for name, p in module.named_parameters() if p not in trained and not is_lazy(p)}
        return {name: p for name, p in others.items() if type(p.data) is Tensor and p.is_floating_point()}

    def _tell_written(self, module: nn.Module) -> None:
        before, self._frozen = self._frozen, {}
        now = self._untrained(module) if before else {}
        if written := [name for name, was in before.items() if name in now and seen(now[name]) != was]:
            warn(
                f"{listed(written)} are in no optimizer and were written in the first batch, by the module's"
                " own code. If they follow other parameters of the module, as momentum and target networks do: these"
                " are W0 here, without what is learned. Use `gradient='merged'`, in which they are the whole weights."
            )

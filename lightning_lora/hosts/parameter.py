"""Any parameter of any module: its weight holds the increment, and reading it lets the full gradient be projected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.gradients import projected
from lightning_lora.gradients.transforms import is_watched
from lightning_lora.hosts.host import Host
from lightning_lora.weights import sharded as shards


class ParameterHost(Host):
    """A module some of whose own parameters have adapters, in ``lora`` under the parameters' names.

    The parameters stay where they are, so nothing that goes by ``named_parameters`` or ``state_dict`` sees a change;
    the attribute of the same name is a property of the class. The module's forward is its own.
    """

    holds_increment = True
    lora: nn.ModuleDict

    @staticmethod
    def reader(name: str) -> property:
        return property(_flat_weights, _set_flat_weights) if name == "_flat_weights" else property(_reader(name))

    def adapted(self) -> Mapping[str, Adapter]:
        return cast(Mapping[str, Adapter], dict(self.lora.items()))

    def factors(self, parameter: str) -> str:
        return f"lora.{parameter}."


def _reader(name: str) -> Callable[[ParameterHost], Tensor]:
    """A function, and no other object that can be called, which the compiler of torch 2.6 does not take."""

    def read(host: ParameterHost) -> Tensor:
        weight = host._parameters[name]
        assert weight is not None
        adapter = cast(Adapter, host.lora[name])
        if not is_watched() or shards.is_part(weight) or shards.is_part(adapter.A):
            return weight  # FSDP2 reads and puts back, one after another, what no forward is to see
        return projected.read(weight, adapter)

    return read


def _flat_weights(rnn: Any) -> list[Tensor]:
    """The list that ``nn.RNNBase`` reads its parameters from, read anew."""
    return [getattr(rnn, name) for name in rnn._flat_weights_names]


def _set_flat_weights(rnn: Any, _: Any) -> None:
    """``nn.RNNBase`` makes the list again when its parameters move; here it is never kept."""


def read_names(module: nn.Module, parameters: list[str]) -> tuple[str, ...]:
    """The attributes through which ``module`` reads ``parameters``."""
    return (*parameters, "_flat_weights") if isinstance(module, nn.RNNBase) else tuple(parameters)

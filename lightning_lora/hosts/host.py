"""What every module with adapters has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_lora.adapters import Adapter
from lightning_lora.hosts.swap import Swapped


class Host(Swapped):
    """A module that carries adapters in its child ``lora``."""

    lora: nn.Module
    holds_increment: ClassVar[bool]
    """Whether the module's weight is W = W0 + increment, to be kept so after each step; else it is W0, frozen."""

    def adapted(self) -> Mapping[str, Adapter]:
        """Name of the module's own parameter -> its adapter."""
        raise NotImplementedError

    def factors(self, parameter: str) -> str:
        """What stands before the names of A and B in this module's state."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A plain state has the weight, which is then the whole weight, and no adapter: the increment becomes zero."""
        for parameter, adapter in self.adapted().items():
            keys = {factor: f"{prefix}{self.factors(parameter)}{factor}" for factor in "AB"}
            if f"{prefix}{parameter}" in state_dict and not any(key in state_dict for key in keys.values()):
                for factor, key in keys.items():
                    value = getattr(adapter, factor).detach()
                    state_dict[key] = torch.zeros_like(value) if factor == adapter.zero else value
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerHost(Host):
    """A layer whose ``weight`` has the adapter ``lora``, which knows how the layer uses it."""

    lora: Adapter

    def adapted(self) -> Mapping[str, Adapter]:
        return {"weight": self.lora}

    def factors(self, parameter: str) -> str:
        return "lora."

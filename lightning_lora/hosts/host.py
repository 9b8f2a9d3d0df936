"""What every module with adapters has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

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


class LayerHost(Host):
    """A layer whose ``weight`` has the adapter ``lora``, which knows how the layer uses it."""

    lora: Adapter

    def adapted(self) -> Mapping[str, Adapter]:
        return {"weight": self.lora}

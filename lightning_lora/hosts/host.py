"""What every module with adapters has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.errors import LoRAError
from lightning_lora.hosts.swap import Swapped


class Host(Swapped):
    """A module that carries adapters in its child ``lora``."""

    attribute = "lora"
    lora: nn.Module
    holds_increment: ClassVar[bool]
    """Whether the module's weight is W = W0 + increment, to be kept so after each step; else it is W0, frozen."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``, before it fails."""
        raise LoRAError(
            f"TorchScript cannot compile a {type(self).__name__} with an adapter. `merge` the module first, or a deep"
            " copy of it; or use `torch.export.export` or `torch.jit.trace`, which take it as it is."
        )

    def adapted(self) -> Mapping[str, Adapter]:
        """Name of the module's own parameter -> its adapter."""
        raise NotImplementedError

    def factors(self, parameter: str) -> str:
        """What stands before the names of A and B in this module's state."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.__dict__.get("_merged_state") and not keep_vars:
            for parameter, adapter in self.adapted().items():
                w = self._parameters[parameter]
                if not adapter.holds:
                    destination[f"{prefix}{parameter}"] = adapter.folded_into(w)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        d = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.__dict__.get("_merged_state"):
            for k in [k for k in d if k.startswith(prefix + "lora.")]: del d[k]
        return d

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A plain state has the weight, which is then the whole weight, and no adapter: the increment becomes zero."""
        for parameter, adapter in self.adapted().items():
            before = f"{prefix}{self.factors(parameter)}"
            names = adapter.state_dict()
            if f"{prefix}{parameter}" in state_dict and not any(f"{before}{name}" in state_dict for name in names):
                for name, value in adapter.without_increment(state_dict[f"{prefix}{parameter}"]).items():
                    state_dict[f"{before}{name}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerHost(Host):
    """A layer whose ``weight`` has the adapter ``lora``, which knows how the layer uses it."""

    lora: Adapter

    def adapted(self) -> Mapping[str, Adapter]:
        return {"weight": self.lora}

    def factors(self, parameter: str) -> str:
        return "lora."

    def rescaled(self, y: Tensor, channel: int = -1) -> Tensor:
        """``y``, the layer's output with the increment, as it is when the weight is rescaled by the adapter's gain."""
        if (gain := self.lora.gain(cast(Tensor, self.weight))) is None:
            return y
        sides = [1] * y.dim()
        sides[channel] = -1
        bias = self._parameters.get("bias")
        gain = gain.view(sides)
        # in the dtype of the gain: in bfloat16 those near 1 would be 1. Where it is 1, y stays as it is, bit for bit.
        scaled = y * gain if bias is None else torch.addcmul((1 - gain) * bias.view(sides), y, gain)
        return scaled.to(y.dtype)

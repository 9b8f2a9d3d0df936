"""Linear, its subclasses, and Hugging Face's Conv1D."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.adapters import Adapter
from lightning_lora.gradients import factored
from lightning_lora.hosts.swap import Swapped


class LinearHost(Swapped):
    """A Linear-like module with an adapter. Whatever its own forward is, the increment is added to what it gives."""

    lora: Adapter
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        return factored.add(super().forward(*args, **kwargs), x, self.lora, self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A plain state has the weight, which is then the whole weight, and no adapter: the increment becomes zero."""
        A, B = f"{prefix}lora.A", f"{prefix}lora.B"
        if f"{prefix}weight" in state_dict and A not in state_dict and B not in state_dict:
            state_dict[A], state_dict[B] = self.lora.A, torch.zeros_like(self.lora.B)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FusedLinearHost(LinearHost):
    """Exactly :class:`torch.nn.Linear`: one function computes its product and the increment."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return factored.linear(input, self.weight, self.bias, self.lora, self.training)


class FusedConv1DHost(LinearHost):
    """Exactly ``transformers.pytorch_utils.Conv1D``: a Linear whose weight is stored (n, m)."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return factored.linear(x, self.weight.T, self.bias, self.lora, self.training)


def _conv1d() -> type[nn.Module] | None:
    """The class ``Conv1D``, if transformers has been imported; where it has not, no module can be one."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of ``module`` is stored (n, m)."""
    conv1d = _conv1d()
    return conv1d is not None and isinstance(module, conv1d)


def is_linear_like(module: nn.Module) -> bool:
    """Whether ``module`` computes X W, as far as its class tells.

    The output projection of :class:`torch.nn.MultiheadAttention` is a Linear that is never called: its parent reads
    its weight. An adapter there would do nothing.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or is_transposed(module)


def host_mixin(module: nn.Module) -> type[LinearHost]:
    """The mixin that carries an adapter for ``module``: the fused ones where its forward is known."""
    if type(module) is nn.Linear:
        return FusedLinearHost
    if type(module) is _conv1d():
        return FusedConv1DHost
    return LinearHost

"""Linear, its subclasses, and Hugging Face's Conv1D."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.adapters import Adapter
from lightning_lora.gradients import factored
from lightning_lora.hosts.swap import Swapped


class LinearHost(Swapped):
    """A Linear-like module with an adapter. Whatever its own forward is, the increment is added to what it gives."""

    lora: Adapter
    training: bool

    def forward(self, x: Tensor) -> Tensor:
        return factored.add(super().forward(x), x, self.lora, self.training)  # type: ignore[misc]


class FusedLinearHost(LinearHost):
    """Exactly :class:`torch.nn.Linear`: one function computes its product and the increment."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return factored.linear(x, self.weight, self.bias, self.lora, self.training)


class FusedConv1DHost(FusedLinearHost):
    """Exactly ``transformers.pytorch_utils.Conv1D``: a Linear whose weight is stored (n, m)."""

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

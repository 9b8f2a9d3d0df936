"""Linear, its subclasses, and Hugging Face's Conv1D."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.gradients import factored, merged
from lightning_lora.hosts.host import LayerHost


class LinearHost(LayerHost):
    """A Linear-like module. Whatever its own forward is, the increment is added to what it gives."""

    holds_increment = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return factored.add(super().forward(input, *args, **kwargs), input, self.lora, self.training)


class FusedLinearHost(LinearHost):
    """Exactly :class:`torch.nn.Linear`: one function computes its product and the increment."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return factored.linear(input, self.weight, self.bias, self.lora, self.training)


class FusedConv1DHost(FusedLinearHost):
    """Exactly ``transformers.pytorch_utils.Conv1D``: a Linear whose weight is stored (n, m)."""

    def forward(self, x: Tensor) -> Tensor:
        return factored.linear(x, self.weight.T, self.bias, self.lora, self.training)


class MergedLinearHost(LayerHost):
    """A Linear-like module whose weight holds the increment: its own forward, with a tap for the gradient."""

    holds_increment = True

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(input, *args, **kwargs)
        return merged.tap_linear(y, input, self.lora) if torch.is_grad_enabled() else y

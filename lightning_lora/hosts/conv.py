"""Convolutions in one to three dimensions, with any stride, padding, dilation and groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora.gradients import merged
from lightning_lora.hosts.host import LayerHost


class _ConvHost(LayerHost):
    """The increment of a convolution with c inputs, m outputs, g groups and a kernel k is two convolutions.

    The weight is the matrix (m, c/g * k), and its increment s B^T A: first a convolution with A as r filters of the
    layer's own geometry for each group, then one with a kernel of 1 and B^T as the filters.
    """

    groups: int

    def increment(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """What ``A`` (r, c/g * k) and ``B`` (r, m) add to the output: (b, m, ...) for ``x`` (b, c, ...)."""
        down = A.view(-1, *self.lora.shape[1:])
        down = down.repeat(self.groups, *(1 for _ in self.lora.shape[1:])) if self.groups > 1 else down
        z = self._conv_forward(x, down, None)  # type: ignore[operator]
        up = (self.lora.scale * B).T.reshape(B.shape[1], B.shape[0], *(1 for _ in self.lora.shape[2:]))
        return _CONVOLUTIONS[up.dim() - 2](z, up, groups=self.groups)


_CONVOLUTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class FactoredConvHost(_ConvHost):
    """A convolution whose increment is computed beside it."""

    holds_increment = False

    def forward(self, input: Tensor) -> Tensor:
        x = nn.functional.dropout(input, self.lora.dropout, self.training)
        return super().forward(input) + self.increment(x, self.lora.A.to(x.dtype), self.lora.B.to(x.dtype))


class MergedConvHost(_ConvHost):
    """A convolution whose weight holds the increment."""

    holds_increment = True

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return merged.tap(y, input, self.lora, self.increment) if torch.is_grad_enabled() else y

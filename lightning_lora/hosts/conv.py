"""Convolutions in one to three dimensions, with any stride, padding, dilation and groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.gradients import merged
from lightning_lora.gradients.presents import presents
from lightning_lora.gradients.transforms import is_watched
from lightning_lora.hosts.host import LayerHost

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _ConvHost(LayerHost):
    """The increment of a convolution with c inputs, m outputs, g groups and a kernel k is two convolutions.

    The weight is the matrix (m, c/g * k), and its increment s B^T A: first a convolution with A as r filters of the
    layer's own geometry for each group, then one with a kernel of 1 and B^T as the filters.
    """

    groups: int

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Z, (b, g * r, ...), for ``x`` (b, c, ...) and ``A`` (r, c/g * k)."""
        filters = A.view(-1, *self.lora.shape[1:])
        if self.groups > 1:
            filters = filters.repeat(self.groups, *(1 for _ in self.lora.shape[1:]))
        return self._conv_forward(x, filters, None)  # type: ignore[operator]

    def up(self, z: Tensor, B: Tensor) -> Tensor:
        """What is added to the output, (b, m, ...), for ``B`` (r, m)."""
        filters = (self.lora.scale * B).T.reshape(B.shape[1], B.shape[0], *(1 for _ in self.lora.shape[2:]))
        return _CONVOLUTIONS[filters.dim() - 2](z, filters, groups=self.groups)


class FactoredConvHost(_ConvHost):
    """A convolution whose increment is computed beside it."""

    holds_increment = False

    @presents(lambda host, input: host._conv_forward(input, host.weight, host.bias))
    def forward(self, input: Tensor) -> Tensor:
        x = F.dropout(input, self.lora.dropout, self.training)
        A, B = (factor.to(x.dtype) for factor in self.lora.increment())
        y, z = super().forward(input), self.down(x, A)
        if self.groups == 1 and y.dim() == len(self.lora.shape) and y.is_contiguous() and y.dtype == B.dtype:
            ups = B.T.expand(y.shape[0], -1, -1)  # a matrix product for each image, summed to y as it is formed
            sums = torch.baddbmm(y.flatten(2), ups, z.flatten(2), alpha=self.lora.scale)
            # no view, which FSDP2 could not follow in place; a trace would keep the numbers that its shape has now
            y = sums.view(y.shape) if torch.jit.is_tracing() else torch.ops.aten._unsafe_view(sums, y.shape)
        else:
            y = y + self.up(z, B)
        return self.rescaled(y, channel=1 - len(self.lora.shape))


class MergedConvHost(_ConvHost):
    """A convolution whose weight holds the increment."""

    holds_increment = True

    @presents(lambda host, input: host._conv_forward(input, host.weight, host.bias))
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return merged.tap(y, input, self) if is_watched() else y

    def up_backward(self, z: Tensor, dy: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        r, g = B.shape[0], self.groups
        ups = B.view(r, g, -1).transpose(0, 1)  # (g, r, m/g)
        rows = dy.reshape(-1, g, ups.shape[-1], z[0, 0].numel())
        dz = (ups @ rows).view(z.shape)
        dB = (z.reshape(-1, g, r, rows.shape[-1]) @ rows.mT).sum(0).transpose(0, 1).reshape(B.shape)
        return dz, dB

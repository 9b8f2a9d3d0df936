"""How a convolution and an embedding compute an increment in two steps: Z from the input by A, then Y from Z by B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Path(Protocol):
    """The two steps of one layer; neither has the scale."""

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Return Z, of r channels, from the layer's input."""

    def up(self, z: Tensor, B: Tensor) -> Tensor:
        """Return the increment of the layer's output."""

    def up_backward(self, z: Tensor, dy: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return dZ and dB of the second step."""


class ConvolutionPath:
    """The increment of a convolution with c inputs, m outputs, g groups and a kernel k is two convolutions.

    The weight is the matrix (m, c/g * k), and its increment s B^T A: first a convolution with A as r filters of the
    layer's own geometry for each group, then one with a kernel of 1 and B^T as the filters.

    Args:
        convolve: The layer's own convolution of an input with filters, without bias.
        shape: Of the weight, (m, c/g, *k).
        groups: g.
    """

    def __init__(self, convolve: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int], groups: int) -> None:
        self.convolve = convolve
        self.shape = tuple(shape)
        self.groups = groups

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Return Z, (b, g * r, ...), for ``x`` (b, c, ...) and ``A`` (r, c/g * k)."""
        filters = A.view(-1, *self.shape[1:])
        if self.groups > 1:
            filters = filters.repeat(self.groups, *(1 for _ in self.shape[1:]))
        return self.convolve(x, filters)

    def up(self, z: Tensor, B: Tensor) -> Tensor:
        """Return the increment of the output, (b, m, ...), for ``B`` (r, m)."""
        filters = B.T.reshape(B.shape[1], B.shape[0], *(1 for _ in self.shape[2:]))
        return _POINTWISE[filters.dim() - 2](z, filters, groups=self.groups)

    def up_backward(self, z: Tensor, dy: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return dZ (b, g * r, ...) and dB (r, m)."""
        r, g = B.shape[0], self.groups
        ups = B.view(r, g, -1).transpose(0, 1)  # (g, r, m/g)
        rows = dy.reshape(-1, g, ups.shape[-1], z[0, 0].numel())
        dz = (ups @ rows).view(z.shape)
        dB = (z.reshape(-1, g, r, rows.shape[-1]) @ rows.mT).sum(0).transpose(0, 1).reshape(B.shape)
        return dz, dB

    def add(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """Return ``y``, the convolution's output for ``x``, with the increment; for one group in one pass over it."""
        z = self.down(x, A)
        if self.groups == 1 and y.dim() == len(self.shape) and y.is_contiguous() and y.dtype == B.dtype:
            ups = B.T.expand(y.shape[0], -1, -1)  # a matrix product for each image, summed to y as it is formed
            sums = torch.baddbmm(y.flatten(2), ups, z.flatten(2), alpha=scale)
            # no view, which FSDP2 could not follow in place; a trace would keep the numbers that its shape has now
            traced = torch.jit.is_tracing()  # type: ignore[attr-defined]
            return sums.view(y.shape) if traced else torch.ops.aten._unsafe_view(sums, y.shape)
        return y + self.up(z, scale * B)


class LookupPath:
    """An embedding is a Linear whose input is one-hot, and whose weight is stored (n, m), n the size of the vocabulary.

    Args:
        padding_idx: An input that gives no gradient.
    """

    def __init__(self, padding_idx: int | None) -> None:
        self.padding_idx = padding_idx

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Return Z, (..., r), for the indices ``x`` (...) and ``A`` (r, n)."""
        if x.is_nested:
            return F.embedding(x, A.T, self.padding_idx)
        z = A.index_select(1, x.flatten()).T.unflatten(0, x.shape) if x.dim() else A[:, x]
        return z if self.padding_idx is None else torch.where((x == self.padding_idx).unsqueeze(-1), z.detach(), z)

    def up(self, z: Tensor, B: Tensor) -> Tensor:
        """Return the increment of the output, (..., m), for ``B`` (r, m)."""
        return z @ B

    def up_backward(self, z: Tensor, dy: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return dZ (..., r) and dB (r, m)."""
        return dy @ B.T, z.flatten(0, -2).T @ dy.flatten(0, -2)

    def add(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """Return ``y``, the rows looked up for ``x``, with the increment."""
        return y + (scale * self.up(self.down(x, A), B)).to(y.dtype)

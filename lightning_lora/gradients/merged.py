"""Y = X W, where W = W0 + s B^T A holds the increment already; the gradients are the thin products of ``factored``.

The forward is the base layer's own, untouched, and so is dX = dY W. What is added is a tap on the output, which passes
Y and dY on and takes dA and dB from X and dY (seed, eq. grad-2).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lora.adapters import Adapter
from lightning_lora.gradients.autocast import without_autocast


class Tapped(Protocol):
    """A layer whose increment is computed in two steps, as that of every layer is."""

    lora: Adapter

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Z, of r channels, from the layer's input."""

    def up_backward(self, z: Tensor, dy: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """dZ and dB, of the step from Z to the output, without the scale."""


def tap_linear(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """``y``, (..., m), the output of a linear layer for ``x``, (..., n), whose gradient is seen by ``adapter``."""
    return _LinearTap.apply(y, x, adapter.A, adapter.B, adapter.scale)


def tap(y: Tensor, x: Tensor, layer: Tapped) -> Tensor:
    """The same for any layer: ``y`` is its output for ``x``."""
    return _Tap.apply(y, x, layer.lora.A, layer.lora.B, layer)


class _LinearTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.s = s
        return y.view_as(y)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        x = x.reshape(-1, x.shape[-1]).to(dy.dtype)
        dA = (B.to(dy.dtype) @ rows.T).mul_(ctx.s) @ x if ctx.needs_input_grad[2] else None
        dB = (A.to(dy.dtype) @ x.T).mul_(ctx.s) @ rows if ctx.needs_input_grad[3] else None
        return dy, None, dA, dB, None


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, layer: Tapped) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = (tensor.detach() for tensor in ctx.saved_tensors)
        x = x.to(dy.dtype) if x.is_floating_point() else x
        with torch.enable_grad():
            z = ctx.layer.down(x, A.requires_grad_().to(dy.dtype))
        dz, dB = ctx.layer.up_backward(z.detach(), dy, B.to(dy.dtype))
        (dA,) = torch.autograd.grad(z, A, dz.mul_(ctx.layer.lora.scale))
        return dy, None, dA, dB.mul_(ctx.layer.lora.scale), None

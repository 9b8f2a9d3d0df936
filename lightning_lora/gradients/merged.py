"""Y = X W, where W = W0 + s B^T A holds the increment already; the gradients are the thin products of ``factored``.

The forward is the base layer's own, untouched, and so is dX = dY W. What is added is a tap on the output, which passes
Y and dY on and takes dA and dB from X and dY (seed, eq. grad-2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lora.adapters import Adapter

Increment = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, A, B) -> what a layer's increment adds to its output."""


def tap_linear(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """``y``, (..., m), the output of a linear layer for ``x``, (..., n), whose gradient is seen by ``adapter``."""
    return _LinearTap.apply(y, x, adapter.A, adapter.B, adapter.scale)


def tap(y: Tensor, x: Tensor, adapter: Adapter, increment: Increment) -> Tensor:
    """The same for any layer, from the function that its increment is."""
    return _Tap.apply(y, x, adapter.A, adapter.B, increment)


class _LinearTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.s = s
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        x = x.reshape(-1, x.shape[-1]).to(dy.dtype)
        dA = (ctx.s * (B.to(dy.dtype) @ rows.T)) @ x if ctx.needs_input_grad[2] else None
        dB = (ctx.s * (A.to(dy.dtype) @ x.T)) @ rows if ctx.needs_input_grad[3] else None
        return dy, None, dA, dB, None


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, increment: Increment) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.increment = increment
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = (tensor.detach() for tensor in ctx.saved_tensors)
        x = x.to(dy.dtype) if x.is_floating_point() else x
        with torch.enable_grad():
            A, B = A.requires_grad_(), B.requires_grad_()
            dA, dB = torch.autograd.grad(ctx.increment(x, A.to(dy.dtype), B.to(dy.dtype)), (A, B), dy)
        return dy, None, dA, dB, None

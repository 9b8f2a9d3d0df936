"""Y = X W, where W = W0 + s B^T A holds the increment already; the gradients are the thin products of ``factored``.

The forward is the base layer's own, untouched, and so is dX = dY W. What is added is a tap on the output, which passes
Y and dY on and takes dA and dB from X and dY (seed, eq. grad-2). Where A is not trained, a linear layer keeps Z = A X^T
and no X; a convolution's own autograd keeps X in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lora.adapters import Adapter
from lightning_lora.gradients.autocast import without_autocast
from lightning_lora.gradients.factored import increment
from lightning_lora.gradients.transforms import is_transformed


class Tapped(Protocol):
    """A layer whose increment is computed in two steps, as that of every layer is."""

    lora: Adapter

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Z, of r channels, from the layer's input."""

    def up(self, z: Tensor, B: Tensor) -> Tensor:
        """The increment of the layer's output, scale included."""

    def up_backward(self, z: Tensor, dy: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """dZ and dB, of the step from Z to the output, without the scale."""


def tap_linear(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """``y``, (..., m), the output of a linear layer for ``x``, (..., n), whose gradient is seen by ``adapter``."""
    if is_transformed():
        return _with_zero(y, lambda A, B: increment(adapter.scale, x.to(y.dtype), A, B), adapter)
    A, B = adapter.factors()
    return _LinearTap.apply(y, x, A, B, adapter) if A.requires_grad or B.requires_grad else y


def tap(y: Tensor, x: Tensor, layer: Tapped) -> Tensor:
    """The same for any layer: ``y`` is its output for ``x``."""
    if is_transformed():
        x = x.to(y.dtype) if x.dtype.is_floating_point else x
        return _with_zero(y, lambda A, B: layer.up(layer.down(x, A), B), layer.lora)
    A, B = layer.lora.as_product(*layer.lora.factors())
    return _Tap.apply(y, x, A, B, layer) if A.requires_grad or B.requires_grad else y


def _with_zero(y: Tensor, increment: Callable[[Tensor, Tensor], Tensor], adapter: Adapter) -> Tensor:
    """``y`` plus a zero: the increment less that of constants of the same values, whose derivatives are those of Y.

    So they are of every order, in A, B and X, while W, which holds the increment, is a constant.
    """
    A, B = (factor.to(y.dtype) for factor in adapter.as_product(*adapter.factors()))
    return y + (increment(A, B) - increment(A.detach(), B.detach()))


class _LinearTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, adapter: Adapter) -> Tensor:
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(x, A, B)
        else:
            ctx.save_for_backward(A.to(x.dtype) @ _rows(x).T)
        ctx.adapter = adapter
        return y.detach()  # no view, on which autograd would allow nothing in place

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows = _rows(dy)
        if ctx.needs_input_grad[2]:
            x, A, B = ctx.saved_tensors
            dA, dB = ctx.adapter.project_thin(_rows(x).to(dy.dtype), rows, A, B)
            return dy, None, dA, dB, None
        (z,) = ctx.saved_tensors
        return dy, None, None, (z.to(dy.dtype) @ rows).mul_(ctx.adapter.scale), None


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, layer: Tapped) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.layer = layer
        return y.detach()  # no view, on which autograd would allow nothing in place

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = (tensor.detach() for tensor in ctx.saved_tensors)
        x = x.to(dy.dtype) if x.dtype.is_floating_point else x
        z, back = _with_backward(lambda A: ctx.layer.down(x, A.to(dy.dtype)), A)
        dz, dB = ctx.layer.up_backward(z, dy, B.to(dy.dtype))
        scale = ctx.layer.lora.scale
        dA = back(dz.mul_(scale)) if ctx.needs_input_grad[2] else None
        return dy, None, dA, dB.mul_(scale), None


def _with_backward(function: Callable[[Tensor], Tensor], A: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``function(A)``, and what takes a gradient of it to that of ``A``.

    The compiler cannot trace the second way; the first was measured to cost half as much again outside of it.
    """
    if torch.compiler.is_compiling():
        z, vjp = torch.func.vjp(function, A)  # type: ignore[misc]
        return z, lambda dz: vjp(dz)[0]
    with torch.enable_grad():
        z = function(A.requires_grad_())
    return z.detach(), lambda dz: torch.autograd.grad(z, A, dz)[0]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])

"""Y = X W, where W = W0 + s B^T A holds the increment already; the gradients are the thin products of ``factored``.

The forward is the base layer's own, untouched, and so is dX = dY W. What is added is a tap on the output, which passes
Y and dY on and takes dA and dB from X and dY (article, eq. grad-2). Where A is not trained, a linear layer keeps
Z = A X^T and no X; a convolution's own autograd keeps X in any case.

A gradient of these gradients must see that W depends on A and B: dX = dY W does. There the tap's backward is the one of
a zero, the increment less the same of constants, whose derivatives of every order are those of Y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapters import Adapter
from lightning_lora.adapters.products import cast
from lightning_lora.gradients.autocast import without_autocast
from lightning_lora.gradients.factored import increment
from lightning_lora.gradients.paths import Path
from lightning_lora.gradients.transforms import takes_formula


def tap_linear(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """Return ``y``, (..., m), a linear layer's output for ``x``, (..., n), whose gradient ``adapter`` sees."""
    if takes_formula(x):
        return _with_zero(y, lambda A, B: increment(adapter.scale, x.to(y.dtype), A, B), adapter)
    A, B = adapter.factors()
    return _LinearTap.apply(y, x, A, B, adapter) if A.requires_grad or B.requires_grad else y


def tap(y: Tensor, x: Tensor, adapter: Adapter, path: Path) -> Tensor:
    """Return the same for any layer: ``y`` is its output for ``x``."""
    if takes_formula(x):
        x = x.to(y.dtype) if x.dtype.is_floating_point else x
        return _with_zero(y, lambda A, B: adapter.scale * path.up(path.down(x, A), B), adapter)
    A, B = adapter.as_product(*adapter.factors())
    return _Tap.apply(y, x, A, B, adapter.scale, path) if A.requires_grad or B.requires_grad else y


def _with_zero(y: Tensor, increment: Callable[[Tensor, Tensor], Tensor], adapter: Adapter) -> Tensor:
    """Add to ``y`` a zero whose derivatives are those of Y: the increment less that of constants of the same values.

    So they are of every order, in A, B and X, while W, which holds the increment, is a constant.
    """
    A, B = (factor.to(y.dtype) for factor in adapter.as_product(*adapter.factors()))
    return y + (increment(A, B) - increment(A.detach(), B.detach()))


class _LinearTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, adapter: Adapter) -> Tensor:
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(x, A, B)
        else:  # A is not trained: Z is all that dB takes of X
            ctx.save_for_backward(A.to(x.dtype) @ _rows(x).T, A, B)
        ctx.adapter = adapter
        return y.detach()  # no view, on which autograd would allow nothing in place

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows = _rows(dy)
        if ctx.needs_input_grad[2]:
            x, A, B = ctx.saved_tensors
            if torch.is_grad_enabled():
                scale = ctx.adapter.scale
                return dy, *_of_zero(dy, x, A, B, lambda x, A, B: increment(scale, x.to(dy.dtype), A, B)), None
            dA, dB = ctx.adapter.project_thin(_rows(x).to(dy.dtype), rows, A, B)
            return dy, None, *cast((dA, dB), A.dtype), None
        z, A, B = ctx.saved_tensors
        dB = (z.to(dy.dtype) @ rows) * ctx.adapter.scale
        dx = None
        if torch.is_grad_enabled():
            dx = (dy @ (B - B.detach()).T.to(dy.dtype) @ A.to(dy.dtype)) * ctx.adapter.scale
        return dy, dx, None, dB, None


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, path: Path) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.scale, ctx.path = scale, path
        return y.detach()  # no view, on which autograd would allow nothing in place

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        x = x.to(dy.dtype) if x.dtype.is_floating_point else x
        if torch.is_grad_enabled():
            found = _of_zero(dy, x, A, B, lambda x, A, B: ctx.scale * ctx.path.up(ctx.path.down(x, A), B))
            return dy, *found, None, None
        z, back = _with_backward(lambda A: ctx.path.down(x, A.to(dy.dtype)), A.detach())
        dz, dB = ctx.path.up_backward(z, dy, B.to(dy.dtype))
        dA = back(dz.mul_(ctx.scale)) if ctx.needs_input_grad[2] else None
        return dy, None, dA, dB.mul_(ctx.scale), None, None


def _of_zero(
    dy: Tensor, x: Tensor, A: Tensor, B: Tensor, increment: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> list[Tensor | None]:
    """Return the gradients with respect to X, A and B, differentiable, of the increment less that of constants."""
    factors = [A.to(dy.dtype), B.to(dy.dtype)]
    zero = increment(x, *factors) - increment(x, *(factor.detach() for factor in factors))
    inputs = [tensor for tensor in (x, A, B) if tensor.requires_grad]
    found = iter(torch.autograd.grad(zero, inputs, dy, create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in (x, A, B)]


def _with_backward(function: Callable[[Tensor], Tensor], A: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return ``function(A)``, and a function that takes a gradient of it to that of ``A``.

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

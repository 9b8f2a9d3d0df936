"""Y = X W0 + Z B with Z = X A, and its gradients from thin products only (article, eqs. lora-2 and grad-2).

With b rows of X, torch's layout W0 (m, n), and rank-major A (r, n), B (r, m), Z (r, b):

    Z  = s A X^T               (r, b)
    Y  = X W0^T + Z^T B        (b, m)
    dZ = s B dY^T              (r, b)
    dX = dY W0 + dZ^T A        (b, n)
    dA = dZ X                  (r, n)
    dB = Z dY                  (r, m)

No dL/dW, which is (m, n), is ever formed. Both sums are formed in place, so nothing of size (b, m) or (b, n) is
allocated besides Y and dX; in dX the thin product comes first, so that it is not read again. With dropout, X is masked
where it meets A and nowhere else; 1/(1 - p) joins s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.adapters.products import cast, scaled
from lightning_lora.gradients.autocast import without_autocast
from lightning_lora.gradients.transforms import takes_formula


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Return ``F.linear(x, weight, bias)`` with the increment ``scale * B.T @ A`` of the weight.

    Args:
        x: (..., n), any number of leading dimensions, none included.
        weight: W0, (m, n), frozen.
        bias: (m,) or None.
        A: (r, n).
        B: (r, m). Both are cast to the dtype in which the product is computed, the one of ``x`` or autocast's, and
            their gradients back.
        scale: s.
        dropout: Probability that an entry of the increment's input is zeroed.

    Returns:
        (..., m)
    """
    x = _in_its_dtype(x)
    if takes_formula(x):
        return F.linear(x, weight, bias) + increment(scale, _dropped(x, dropout), A.to(x.dtype), B.to(x.dtype))
    mask, scale = _mask(x, scale, dropout)
    return _Linear.apply(x, weight, bias, A, B, mask, scale)


def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Return ``y`` (..., m), any layer's output, with the increment for the input ``x`` (..., n); see :func:`linear`.

    ``y`` is left as it is, since the graph that made it may need it.
    """
    x = _in_its_dtype(x)
    if takes_formula(x):
        return y + increment(scale, _dropped(x, dropout), A.to(x.dtype), B.to(x.dtype)).to(y.dtype)
    mask, scale = _mask(x, scale, dropout)
    return _Add.apply(y, x, A, B, mask, scale)


def rescaled(y: Tensor, gain: Tensor | None, bias: Tensor | None, channel: int = -1) -> Tensor:
    """Return ``y``, a layer's output with the increment, as it is when its weight is multiplied by ``gain`` (m,)."""
    if gain is None:
        return y
    if y.is_nested:  # which is multiplied by matrices only
        return F.linear(y, gain.diag().to(y.dtype), None if bias is None else ((1 - gain) * bias).to(y.dtype))
    sides = [1] * y.dim()
    sides[channel] = -1
    gain = gain.view(sides)
    # in the dtype of the gain: in bfloat16 those near 1 would be 1. Where it is 1, y stays as it is, bit for bit.
    scaled = y * gain if bias is None else torch.addcmul((1 - gain) * bias.view(sides), y, gain)
    return scaled.to(y.dtype)


def increment(s: float, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return the increment of Y as a formula, (..., m), which ``torch.func`` differentiates and batches by itself."""
    return s * F.linear(F.linear(x, A), B.T)


def _in_its_dtype(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype in which a product of it is computed: its own, or autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast leaves alone
        return x.to(torch.get_autocast_dtype(device))
    return x


def _mask(x: Tensor, scale: float, dropout: float) -> tuple[Tensor | None, float]:
    if dropout == 0:
        return None, scale
    kept = 1 - dropout
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(kept), scale / kept


def _dropped(x: Tensor, dropout: float) -> Tensor:
    """Return ``x`` after dropout, of a strided tensor with the mask that :func:`_mask` draws."""
    if x.is_nested or x.layout is not torch.strided:
        return F.dropout(x, dropout)
    mask, scale = _mask(x, 1.0, dropout)
    return x if mask is None else x * mask * scale


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None, s: float
    ) -> Tensor:
        y = F.linear(x, weight, bias)  # first, so that with B = 0 it is the base layer's bit for bit on any device
        a, b = cast((A, B), x.dtype)
        z = _z(s, x, a, mask)
        y.view(-1, y.shape[-1]).addmm_(z.T, b)
        ctx.save_for_backward(x, weight, mask, z, A, B, *_casts(A, a, b))
        ctx.s = s
        return y.detach()  # no view, as F.linear may give, on which autograd would allow nothing in place

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, z, *factors = ctx.saved_tensors
        A, B = _in_dtype_of(x, *factors)
        need_x, need_weight, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        dy = _rows(dy)
        dz = scaled(ctx.s, B, dy.T)
        dA, dB = _factors(ctx.s, x, A, mask, z, dy, dz, need_A, need_B, factors[0].dtype)
        dx = None
        if need_x:
            dx = dz.T @ A if mask is None else (dz.T @ A).mul_(_rows(mask))
            dx = dx.addmm_(dy, weight.to(dy.dtype)).view(x.shape)
        dweight = dy.T @ _rows(x) if need_weight else None  # None while W0 is frozen, as it should be
        dbias = dy.sum(0) if need_bias else None
        return dx, dweight, dbias, dA, dB, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, s: float) -> Tensor:
        a, b = cast((A, B), x.dtype)
        z = _z(s, x, a, mask)
        ctx.save_for_backward(x, mask, z, A, B, *_casts(A, a, b))
        ctx.s = s
        y = y.clone(memory_format=torch.contiguous_format)
        _rows(y).addmm_(z.T.to(y.dtype), b.to(y.dtype))  # in place, where autocast leaves the dtype alone
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, z, *factors = ctx.saved_tensors
        A, B = _in_dtype_of(x, *factors)
        _, need_x, need_A, need_B, *_ = ctx.needs_input_grad
        rows = _rows(dy).to(x.dtype)
        dz = scaled(ctx.s, B, rows.T)
        dx = None
        if need_x:
            dx = (dz.T @ A).view(x.shape)
            dx = dx if mask is None else dx * mask
        return dy, dx, *_factors(ctx.s, x, A, mask, z, rows, dz, need_A, need_B, factors[0].dtype), None, None


def _casts(A: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Return what is saved beside A and B: their casts, if these are other tensors."""
    return () if a is A else (a, b)


def _in_dtype_of(x: Tensor, A: Tensor, B: Tensor, *casts: Tensor) -> Sequence[Tensor]:
    """Return the factors as they took part in the product; where a gradient of gradients is asked for, with a path."""
    return cast((A, B), x.dtype) if torch.is_grad_enabled() else casts or (A, B)


def _z(s: float, x: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """Compute Z = s A X^T, (r, b), of the masked X where there is dropout."""
    return scaled(s, A, _rows(x if mask is None else x * mask).T)


def _factors(
    s: float,
    x: Tensor,
    A: Tensor,
    mask: Tensor | None,
    z: Tensor,
    dy: Tensor,
    dz: Tensor,
    need_A: bool,
    need_B: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dA = dZ X and dB = Z dY, in ``dtype``."""
    if torch.is_grad_enabled():  # a gradient of these gradients must see that Z depends on X and A
        z = _z(s, x, A, mask)
    dA = dz @ _rows(x if mask is None else x * mask) if need_A else None
    dB = z @ dy if need_B else None
    found = iter(cast([gradient for gradient in (dA, dB) if gradient is not None], dtype))
    return next(found) if need_A else None, next(found) if need_B else None

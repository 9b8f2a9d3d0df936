"""The optimizer's view: the full gradient G = dL/dW is projected to dA and dB (article, eq. grad-1) and freed at once.

Reading a weight gives W itself, which holds the increment. Whatever the module does with it is its own affair; G comes
out of autograd, one weight at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapters import Adapter
from lightning_lora.adapters.products import cast
from lightning_lora.gradients.autocast import without_autocast
from lightning_lora.gradients.presents import presents
from lightning_lora.gradients.transforms import is_transformed


@presents(lambda weight, _: weight)
def read(weight: Tensor, adapter: Adapter) -> Tensor:
    """Return ``weight``, which holds the increment, with a gradient that goes to the trained tensors of ``adapter``."""
    gain = adapter.gain(weight)
    if is_transformed():
        return _formula(weight, *adapter.factors(), gain, adapter)
    return _Read.apply(weight, *adapter.factors(), gain, adapter)


def _formula(weight: Tensor, A: Tensor, B: Tensor, gain: Tensor | None, adapter: Adapter) -> Tensor:
    """Return W plus a zero whose derivatives of every order are those of W."""
    delta = adapter.delta(*adapter.as_product(A, B), weight.dtype)
    zero = (delta - delta.detach()).to(weight.dtype)
    if gain is None:
        return weight + zero
    rows, held = adapter.by_rows(gain), adapter.by_rows(gain.detach())
    return (weight * (rows / held) + held * zero).to(weight.dtype)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, A: Tensor, B: Tensor, gain: Tensor | None, adapter: Adapter) -> Tensor:
        ctx.save_for_backward(weight, A, B, gain)
        ctx.adapter = adapter
        return weight.view_as(weight)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, gain = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is asked for
            inputs = [p for p in (A, B, gain) if p is not None and p.requires_grad]
            value = _formula(weight.detach(), A, B, gain, ctx.adapter)
            found = iter(torch.autograd.grad(value, inputs, gradient, create_graph=True, allow_unused=True))
            each = [next(found) if p is not None and p.requires_grad else None for p in (A, B, gain)]
            return None, *each, None
        G, dgain = ctx.adapter.as_matrix(gradient), None
        if gain is not None:  # W = gain V
            dgain = (G * ctx.adapter.as_matrix(weight)).sum(-1) / gain
            G = G * gain.to(G.dtype)[..., None]
        return None, *cast(ctx.adapter.project(G, A, B), A.dtype), dgain, None

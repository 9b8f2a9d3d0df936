"""The optimizer's view: the full gradient G = dL/dW is projected to dA and dB (seed, eq. grad-1) and freed at once.

Reading a weight gives W itself, which holds the increment. Whatever the module does with it is its own affair; G comes
out of autograd, one weight at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lora.adapters import Adapter
from lightning_lora.gradients.autocast import without_autocast
from lightning_lora.gradients.presents import presents
from lightning_lora.gradients.transforms import is_transformed


@presents(lambda weight, _: weight)
def read(weight: Tensor, adapter: Adapter) -> Tensor:
    """``weight``, with a gradient that goes to the factors of ``adapter``."""
    gain = adapter.gain(weight)
    if is_transformed():
        delta = adapter.delta(*adapter.as_product(*adapter.factors()), weight.dtype)
        zero = (delta - delta.detach()).to(weight.dtype)  # whose derivatives are those of W
        if gain is None:
            return weight + zero
        rows, held = adapter.by_rows(gain), adapter.by_rows(gain.detach())
        return (weight * (rows / held) + held * zero).to(weight.dtype)
    return _Read.apply(weight, *adapter.factors(), gain, adapter)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, A: Tensor, B: Tensor, gain: Tensor | None, adapter: Adapter) -> Tensor:
        ctx.save_for_backward(weight, A, B, gain)
        ctx.adapter = adapter
        return weight.view_as(weight)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, gain = ctx.saved_tensors
        G, dgain = ctx.adapter.as_matrix(gradient), None
        if gain is not None:  # W = gain V
            dgain = (G * ctx.adapter.as_matrix(weight)).sum(-1) / gain
            G = G * gain.to(G.dtype)[..., None]
        dweight = gradient if ctx.needs_input_grad[0] else None  # None while W is frozen, as it should be
        return dweight, *ctx.adapter.project(G, A, B), dgain, None

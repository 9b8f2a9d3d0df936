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


def read(weight: Tensor, adapter: Adapter) -> Tensor:
    """``weight``, with a gradient that goes to the factors of ``adapter``."""
    return _Read.apply(weight, adapter.A, adapter.B, adapter)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, A: Tensor, B: Tensor, adapter: Adapter) -> Tensor:
        ctx.adapter = adapter
        return weight.view_as(weight)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.adapter.project(gradient), None

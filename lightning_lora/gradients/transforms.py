"""When ``torch.func`` differentiates or batches."""

from __future__ import annotations

import torch


def is_transformed() -> bool:
    """Whether a call is inside ``torch.func.grad``, ``vmap``, ``jvp`` or their like.

    A ``torch.autograd.Function`` takes part in these only if it has a ``setup_context``, and then each call of it costs
    half as much again (measured: 95 us a layer for 62, forward and backward) outside of them too. So inside them the
    increment is a formula of plain operations, right to every order of derivatives.
    """
    return torch._C._are_functorch_transforms_active()

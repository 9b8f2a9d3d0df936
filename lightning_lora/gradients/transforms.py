"""When ``torch.func`` differentiates or batches, or ``torch.jit.trace`` writes down what is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora import _compat


def is_transformed() -> bool:
    """Return whether a call is inside ``torch.func.grad``, ``vmap``, ``jvp`` or their like, or ``torch.jit.trace``.

    A ``torch.autograd.Function`` takes part in these only if it has a ``setup_context``, and then each call of it costs
    half as much again (measured: 95 us a layer for 62, forward and backward) outside of them too. So inside them the
    increment is a formula of plain operations, right to every order of derivatives. A trace has use for these too: what
    it keeps of a ``Function`` cannot be saved.
    """
    return _compat.is_functorch_active() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def takes_formula(x: Tensor) -> bool:
    """Return whether the increment for the input ``x`` has to be a formula of plain operations.

    So it is in a transform, and where ``x`` is no dense tensor that can be taken as a matrix of rows: it is nested, as
    a batch of sequences of several lengths, or sparse.
    """
    return is_transformed() or x.layout is not torch.strided or x.is_nested


def is_watched() -> bool:
    """Return whether a gradient may be asked for; if not, a weight that holds its increment is all that is needed.

    ``torch.jit.trace`` traces twice, the second time without gradients, and compares.
    """
    return torch.is_grad_enabled() and not torch.jit.is_tracing()  # type: ignore[attr-defined]

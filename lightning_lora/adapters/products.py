"""Operations on factors in as few launches as there can be: on an accelerator, small ones cost more than their work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora import _compat


def scaled(s: float, factor: Tensor, other: Tensor) -> Tensor:
    """Return ``s * factor @ other``, differentiable, by one operation.

    Args:
        s: The scale.
        factor: (r, k), or a stack (q, r, k).
        other: (k, l), or a stack (q, k, l).

    Returns:
        (r, l) or (q, r, l)
    """
    if s == 1:
        return factor @ other
    product = torch.baddbmm if factor.dim() == 3 else torch.addmm
    # beta = 0 leaves the first tensor out. It is a finite one all the same, for `vmap` multiplies it by 0
    return product(factor.detach()[..., :1], factor, other, beta=0, alpha=s)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Return ``tensors``, which have one dtype, in ``dtype``: by one operation where no gradient is asked for."""
    if not tensors or tensors[0].dtype == dtype:
        return tensors
    if torch.is_grad_enabled():
        return [tensor.to(dtype) for tensor in tensors]
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    _compat.copy_each(results, tensors)
    return results

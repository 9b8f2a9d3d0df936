"""Rounding that is right on average."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds float32 ``x`` to one of its two neighbours in ``dtype``, so that the expectation is ``x``.

    With the neighbours a <= x <= b, b is taken with the probability (x - a) / (b - a).

    Args:
        x: Any shape, float32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: Of the draws, on the CPU.

    Returns:
        The shape of ``x``, in ``dtype``.
    """
    nearest = x.to(dtype)
    error = x - nearest.float()
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).to(dtype))
    gap = (other.float() - nearest.float()).abs()
    # not in the default dtype: that of a step in manual optimization under "bf16-true" has 256 numbers in [0, 1)
    draws = torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
    return torch.where(draws * gap < error.abs(), other, nearest)

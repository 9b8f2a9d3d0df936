"""Rounding that is right on average."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.weights import counter


def round_stochastically(x: Tensor, dtype: torch.dtype, key: counter.Key, first: int = 0) -> Tensor:
    """Round ``x`` to one of its two neighbours in ``dtype``, so that the expectation is ``x``.

    With the neighbours a <= x <= b, b is taken with the probability (x - a) / (b - a), by 16 random bits an entry.

    A bfloat16 is the upper half of a float32. There it takes one addition: of random bits to the lower half, whose
    carry is the rounding, exact to the last bit.

    Args:
        x: Any shape, taken as float32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        key: Of the random bits.
        first: The number of the first entry of ``x`` in the tensor that it is a part of.

    Returns:
        The shape of ``x``, in ``dtype``.
    """
    x = x.float().contiguous()
    noise = counter.halves(key, first, x.numel(), x.device).view(x.shape)
    if dtype == torch.bfloat16:
        bits = x.view(torch.int32).clamp_max(0x7FFF0000)  # no carry turns "not a number" into one
        return noise.add_(bits).bitwise_and_(-0x10000).view(torch.float32).to(dtype)
    nearest = x.to(dtype)
    error = x - nearest.float()
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).to(dtype))
    gap = (other.float() - nearest.float()).abs()
    return torch.where(noise.float() * gap < error.abs() * 0x10000, other, nearest)

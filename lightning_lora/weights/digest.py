"""Digests of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of the bytes of ``tensor``."""
    data = tensor.detach().cpu().contiguous().view(-1)
    if data.stride(0) != 1:  # one element may have any stride
        data = data.clone(memory_format=torch.contiguous_format)
    return hashlib.sha256(data.view(torch.uint8).numpy()).hexdigest()  # type: ignore[arg-type]


SAMPLE = 4096
"""How many entries of a weight are looked at to tell whether it was written to."""


def sample(weight: Tensor) -> str:
    """Return the SHA-256 of evenly spaced entries of ``weight``."""
    flat = weight.detach().reshape(-1)
    return digest(flat[:: max(1, flat.numel() // SAMPLE)])

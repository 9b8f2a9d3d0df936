"""Digests of tensors, by which a weight is told from others, and from itself after it was written to."""

from __future__ import annotations

import hashlib
from typing import Any

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


def fingerprint(weight: Tensor) -> str:
    """Return the dtype, shape and SHA-256 of ``weight``, as ``"float32:64x32:9f86..."``."""
    dtype, shape = str(weight.dtype).removeprefix("torch."), "x".join(map(str, weight.shape))
    return f"{dtype}:{shape}:{digest(weight)}"


def seen(weight: Tensor) -> tuple[Any, ...]:
    """Return what changes when ``weight`` is written to: its address, its version, and a sample of its entries.

    ``weight.data.clamp_()`` and the like move no version counter; the sample, evenly spaced, notices those that touch
    most entries.
    """
    if type(weight.data) is not Tensor:  # quantised or sharded
        return id(weight), weight._version
    return weight.data_ptr(), weight._version, sample(weight)

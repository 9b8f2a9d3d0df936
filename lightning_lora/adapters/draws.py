"""Random numbers that depend on a seed and a layer's name, and on nothing else."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(*key: str) -> torch.Generator:
    """A CPU generator for ``key``, such as a seed and a layer's name.

    Equal on every rank and in the run that resumes, whatever has used the global generator; another key gives
    another stream, but for chance: torch seeds these generators with 32 bits.
    """
    hashed = hashlib.sha256("/".join(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8], "little", signed=True))


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of ``tensor``."""
    data = tensor.detach().cpu().contiguous().view(-1)
    if data.stride(0) != 1:  # one element may have any stride
        data = data.clone(memory_format=torch.contiguous_format)
    return hashlib.sha256(data.view(torch.uint8).numpy()).hexdigest()  # type: ignore[arg-type]

"""Random numbers that depend on a seed and a layer's name, and on nothing else."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(*key: str) -> torch.Generator:
    """A CPU generator for ``key``, such as a seed and a layer's name.

    Equal on every rank and in the run that resumes, whatever has used the global generator; another key gives an
    unrelated stream.
    """
    hashed = hashlib.sha256("/".join(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8], "little", signed=True))


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of ``tensor``."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()  # type: ignore[arg-type]

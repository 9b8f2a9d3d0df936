"""Random numbers that depend on a seed and a layer's name, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the layer called ``name``.

    Equal on every rank and in the run that resumes, whatever has used the global generator; another layer's name gives
    an unrelated stream.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

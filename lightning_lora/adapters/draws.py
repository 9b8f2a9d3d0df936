"""Random numbers that depend on a seed and a layer's name, and on nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.weights import counter


def generator(*key: str) -> torch.Generator:
    """Return a CPU generator for ``key``, such as a seed and a layer's name: for what is drawn once, at the start.

    Equal on every rank, whatever has used the global generator; another key gives another stream, but for chance: torch
    seeds these generators with 32 bits.
    """
    hashed = hashlib.sha256("/".join(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8], "little", signed=True))


def normal(key: counter.Key, shape: Sequence[int], device: torch.device) -> Tensor:
    """Entries ~ N(0, 1), float32, made on ``device`` from the key alone; between devices the last bit may differ.

    The inverse of the normal distribution at the middles of 2^23 equal parts of (0, 1), which end at 5.3.
    """
    odd = (counter.words(key, 0, math.prod(shape), device) >> 9).mul_(2).add_(1)  # of 24 bits, which float32 has
    return odd.to(torch.float32).mul_(2.0**-23).erfinv_().mul_(2**0.5).view(shape)


def normal_of_format_2(key: str, drawn_at: int, shape: Sequence[int], std: float) -> Tensor:
    """Draw N(0, std^2) as the versions that wrote files of format 1 and 2 did."""
    values = torch.zeros(shape, dtype=torch.float32, device="cpu")
    return values.normal_(0, std, generator=generator(key, str(drawn_at)))

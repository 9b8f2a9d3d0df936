"""The singular values of an increment, from its factors alone, and what they say of the rank it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.adapters.adapter import Adapter


@torch.no_grad()
def singular_values(adapter: Adapter) -> Tensor:
    """Return those of the increment ``scale * B'.T @ A'``, descending, (r',) or (k, r'), in float64.

    With A'^T = Q R and B'^T = P S they are those of ``scale * S R^T``, which has as many rows as A' and B'.
    """
    A, B = (factor.double() for factor in adapter.increment())
    R, S = (torch.linalg.qr(factor.mT, mode="r").R for factor in (A, B))
    return torch.linalg.svdvals(S @ R.mT) * abs(adapter.scale)


def effective_rank(values: Tensor) -> float:
    """Return exp(entropy) of ``values``, (r,), divided by their sum; 0 where all are zero.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (2007).
    """
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def rank_for(values: Tensor, share: float = 0.99) -> int:
    """Return how many of the largest ``values``, (r,), hold this share of the sum of their squares."""
    squares = values.square()
    return int((squares.cumsum(0) < share * squares.sum()).sum()) + bool(squares.any())

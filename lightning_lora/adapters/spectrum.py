"""What an adapter has learned, from its factors alone: singular values of the increment, ranks, norms of the change.

The increment s B^T A, (m, n), has the singular values of s R_B R_A^T, (r, r), where Q_A R_A = A^T and Q_B R_B = B^T.
Nothing here waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.adapters.adapter import Adapter

SWEEPS = 10
"""How often all pairs of columns are rotated."""
ROWS = 1024
"""How many rows of a weight are cast at a time."""


@torch.no_grad()
def core(adapter: Adapter, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix (r', r') or (k, r', r') of which the increment has the singular values.

    r' is the number of rows of what :meth:`Adapter.increment` gives, up to twice the rank. The tensors are full.
    """
    A, B = (factor.to(torch.promote_types(factor.dtype, dtype)) for factor in adapter.increment())
    with torch.autocast(A.device.type, enabled=False):
        right, left = (torch.linalg.qr(factor.mT, mode="r")[1] for factor in (A, B))
        return adapter.scale * left @ right.mT


@torch.no_grad()
def singular_values(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return those of each of ``cores``, in descending order; those of one shape are computed together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(cores):
        by_shape.setdefault(tuple(matrix.shape), []).append(i)
    values: dict[int, Tensor] = {}
    for same in by_shape.values():
        batch = torch.stack([cores[i] for i in same])
        # on an accelerator torch's own waits for the device
        found = torch.linalg.svdvals(batch) if batch.device.type == "cpu" else jacobi(batch)
        values |= dict(zip(same, found.unbind(), strict=True))
    return [values[i] for i in range(len(cores))]


@torch.no_grad()
def jacobi(matrix: Tensor) -> Tensor:
    """Return the singular values of ``matrix`` (..., p, q), descending, by a fixed number of one-sided Jacobi sweeps.

    They converge fast from a triangular matrix, transposed (Drmac and Veselic, "New fast and accurate Jacobi SVD
    algorithm", 2008). Each round rotates q/2 pairs of columns until they are orthogonal, all at once; then all but the
    first move on by one place, as in a tournament. At the end the values are the norms of the columns.
    """
    matrix = torch.linalg.qr(matrix, mode="r")[1].mT
    if odd := matrix.shape[-1] % 2:
        matrix = torch.cat([matrix, torch.zeros_like(matrix[..., :1])], -1)
    half = matrix.shape[-1] // 2
    x, y = matrix[..., :half], matrix[..., half:]
    for _ in range(SWEEPS * (2 * half - 1)):
        a, b, c = x.square().sum(-2), y.square().sum(-2), (x * y).sum(-2)
        # of the smaller rotation, by at most 45 degrees, after which x^T y = 0
        angle = 0.5 * torch.atan2(torch.where(a < b, -2 * c, 2 * c), (a - b).abs())
        cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
        x, y = cos * x + sin * y, cos * y - sin * x
        if half > 1:
            x, y = torch.cat([x[..., :1], y[..., :1], x[..., 1:-1]], -1), torch.cat([y[..., 1:], x[..., -1:]], -1)
    norms = torch.linalg.vector_norm(torch.cat([x, y], -1), dim=-2).sort(-1, descending=True).values
    return norms[..., :-1] if odd else norms


def effective_rank(values: Tensor) -> Tensor:
    """Return exp(-sum p log p) with p = sigma / sum sigma (Roy and Vetterli, 2007); 0 where all are zero."""
    total = values.sum(-1, keepdim=True)
    p = values / torch.where(total > 0, total, 1)
    return torch.special.entr(p).sum(-1).exp() * (total[..., 0] > 0)


def rank_holding(values: Tensor, share: float) -> Tensor:
    """Return the smallest k such that the first k of ``values``, descending, have ``share`` of the sum of squares."""
    held = values.square().cumsum(-1)
    return ((held < share * held[..., -1:]).sum(-1) + 1) * (held[..., -1] > 0)


@torch.no_grad()
def change(adapter: Adapter, weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return |W - W0| and |W0|, Frobenius norms, by thin products of the weight.

    With V = W0 + D and W = g V, W - W0 is (g - 1) W0 + g D, of which both terms are small. So each row's square is
    (g - 1)^2 |W0|^2 + 2 g (g - 1) <W0, D> + g^2 |D|^2, no difference of large numbers.

    Args:
        adapter: That of the weight, with full tensors.
        weight: The full weight, W or W0 as ``adapter.holds`` says. Where projections are drawn anew and W holds all
            that was learned, W0 is what it was at the last draw.
        dtype: Of the sums, at least.
    """
    A, B = adapter.increment()
    dtype = torch.promote_types(torch.promote_types(A.dtype, weight.dtype), dtype)
    A, B, M = A.to(dtype), B.to(dtype), adapter.as_matrix(weight.detach())
    gain = adapter.gain(weight)
    with torch.autocast(M.device.type, enabled=False):
        AM = torch.cat([A @ rows.to(dtype).mT for rows in M.split(ROWS, -2)], -1)
        D, cross = (adapter.scale * (product * B).sum(-2) for product in (adapter.scale * (A @ A.mT) @ B, AM))
        rows = torch.linalg.vector_norm(M, dim=-1, dtype=dtype).square()
        g = torch.ones_like(D) if gain is None else gain.to(dtype)
        if adapter.holds:  # M = g (W0 + D)
            rows, cross = rows / g**2 - 2 * cross / g + D, cross / g - D
        changed = (g - 1) ** 2 * rows + 2 * g * (g - 1) * cross + g**2 * D
    return changed.sum().clamp_min(0).sqrt(), rows.sum().clamp_min(0).sqrt()

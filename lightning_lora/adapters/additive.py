"""W = W0 + A I_r(1 x m/r) + I_r(n/r x 1) B, the article's own variant ("A Variant")."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lora.adapters.adapter import Adapter


class Additive(Adapter, decomposition="additive"):
    """The increment with entries ``scale * (A[i % r, j] + B[j % r, i])``: A and B are repeated, not multiplied.

    In the article's layout: A I_r(1 x m/r) + I_r(n/r x 1) B, where both I are rows or columns of blocks of the unit
    matrix; for r = 1, w_ij = a_i + b_j. Its rank is up to 2r for as many parameters as a product of rank r has.

    A and B are added to the weight, never multiplied, and gradients are sums of G, or of X and dY, over blocks. Only
    where the weight is W0 and the increment is computed beside it, it is taken as the product [A; I]^T [I; B]: that was
    measured to be faster than sums of X and of dY, and than forming W in each forward.

    Both factors start at zero. Where they start would not matter: their gradients do not depend on them.
    """

    has_inits: ClassVar[bool] = False
    has_projections: ClassVar[bool] = False

    @classmethod
    def check_shape(cls, name: str, m: int, n: int, rank: int, init: str) -> None:
        common = math.gcd(m, n)
        if common % rank:
            works = ", ".join(str(r) for r in range(1, common + 1) if common % r == 0)
            raise ValueError(
                f"`decomposition='additive'` needs a rank that divides both sides of a weight, and {rank} does not"
                f" divide those of {name!r}, {m} x {n}. Ranks that would work: {works}; for this one alone by"
                f" `rank_pattern={{{name!r}: ...}}`."
            )

    def start(self, weight: Tensor, init: str) -> None:
        self.zero = ("A", "B")

    def as_product(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return [A; I_r(1 x n/r)] and [I_r(1 x m/r); B], of rank 2r, for layers that take it in two steps."""
        unit = torch.eye(self.rank, dtype=A.dtype, device=A.device)
        n, m = A.shape[-1] // self.rank, B.shape[-1] // self.rank
        tall, wide = (unit.tile(1, blocks).expand(*A.shape[:-2], -1, -1) for blocks in (n, m))
        if self.padding_idx is not None:
            tall = tall.index_fill(-1, torch.full((), self.padding_idx, device=A.device), 0)
        return torch.cat([A, tall], -2), torch.cat([wide, B], -2)

    def formed(self, dtype: torch.dtype) -> Tensor:
        dtype = torch.promote_types(self.A.dtype, dtype)
        delta = torch.zeros(self.shape, dtype=dtype, device=self.A.device)
        self.add_step(self.as_matrix(delta), self.A.to(dtype), self.B.to(dtype))
        return delta

    def project(self, gradient: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """G summed over its blocks of r rows, and of r columns."""
        dA = gradient.unflatten(-2, (-1, self.rank)).sum(-3)
        dB = gradient.unflatten(-1, (-1, self.rank)).sum(-2).mT
        return self.scale * dA, self.scale * dB

    def project_thin(self, x: Tensor, dy: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """dY, summed over its blocks of columns, times X; X, summed over its blocks, times dY."""
        return self._sums(dy).T @ x, self._sums(x).T @ dy

    def step(self, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return the differences of A and of B, in which the increment is linear."""
        return A_next - A, B_next - B

    def add_step(self, matrix: Tensor, A: Tensor, B: Tensor) -> None:
        """Add the increment of A and B to ``matrix`` (m, n) in place."""
        matrix.unflatten(-2, (-1, self.rank)).add_(A.unsqueeze(-3), alpha=self.scale)
        padding = None if self.padding_idx is None else matrix[..., self.padding_idx].clone()
        wide = math.gcd(matrix.shape[-1] // self.rank, max(1, 64 // self.rank))  # short rows are added slowly
        matrix.unflatten(-1, (-1, wide * self.rank)).add_(B.mT.tile(wide).unsqueeze(-2), alpha=self.scale)
        if padding is not None:
            matrix[..., self.padding_idx] = padding

    def _sums(self, rows: Tensor) -> Tensor:
        """Return (b, r), the scaled sums over the blocks of ``rows`` (b, a multiple of r)."""
        return rows.unflatten(-1, (-1, self.rank)).sum(-2).mul_(self.scale)

    def _is_zero(self) -> bool:
        return not (self.A.any() or self.B.any())

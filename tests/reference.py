"""The seed's formulas as they stand, in its own layout: X is (b, n), W is (n, m), A is (n, r), B is (r, m).

From "LoRA from a Gradient Perspective". Written to be read beside the article, in float64; the library's code, which is
written to be fast, is held to it.
"""

import torch
from torch import Tensor


def forward_merged(X: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Y = X (W0 + A B), eq. lora-1."""
    return X @ (W0 + A @ B)


def forward_factored(X: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Y = X W0 + Z B with Z = X A, eq. lora-2."""
    Z = X @ A
    return X @ W0 + Z @ B


def gradients_projected(X: Tensor, dY: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dA = G B^T and dL/dB = A^T G with the full gradient G = X^T dY, eq. grad-1."""
    G = X.T @ dY
    return G @ B.T, A.T @ G


def gradients_factored(X: Tensor, dY: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dA = X^T (dY B^T) and dL/dB = (X A)^T dY, eq. grad-2."""
    return X.T @ (dY @ B.T), (X @ A).T @ dY


def gradient_of_input(dY: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """dL/dX = dY W^T, from eq. lora-1."""
    return dY @ (W0 + A @ B).T


def sgd_step(W: Tensor, G: Tensor, A: Tensor, B: Tensor, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """A and B a step on, and W_{t+1} = W_t + (A_{t+1} B_{t+1} - A_t B_t)."""
    A_next = A - lr * G @ B.T
    B_next = B - lr * A.T @ G
    return W + (A_next @ B_next - A @ B), A_next, B_next


def block_row(r: int, blocks: int, like: Tensor) -> Tensor:
    """I_{r(1 x blocks)}: unit matrices of r x r side by side."""
    return torch.cat([torch.eye(r, dtype=like.dtype)] * blocks, dim=1)


def block_column(r: int, blocks: int, like: Tensor) -> Tensor:
    """I_{r(blocks x 1)}: the same one under the other."""
    return torch.cat([torch.eye(r, dtype=like.dtype)] * blocks, dim=0)


def additive(A: Tensor, B: Tensor) -> Tensor:
    """A I_{r(1 x m/r)} + I_{r(n/r x 1)} B, the increment of the section "A Variant"."""
    (n, r), (_, m) = A.shape, B.shape
    return A @ block_row(r, m // r, A) + block_column(r, n // r, B) @ B


def symmetric(W0: Tensor, A0: Tensor, B0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W = W0 - A0 B0 + A B, of the section "Optimization Perspective"."""
    return W0 - A0 @ B0 + A @ B


def dora(W0: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
    """magnitude * V / ||V|| by columns with V = W0 + A B, the norm a constant (Liu et al., 2024, section 4.3)."""
    V = W0 + A @ B
    return magnitude * V / V.norm(dim=0, keepdim=True).detach()

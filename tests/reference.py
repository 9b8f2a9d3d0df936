"""The seed's formulas as they stand, in its own layout: X is (b, n), W is (n, m), A is (n, r), B is (r, m).

From "LoRA from a Gradient Perspective". Written to be read beside the article, in float64; the library's code, which is
written to be fast, is held to it.
"""

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

"""A and B from the gradient at the start.

Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (2024). With the singular vectors of the
gradient G = U S V^T of a weight (m, n), in the paper's scale with gamma = 16,

    A0 = m^(1/4) / sqrt(gamma) V[:, :r]^T          B0 = m^(1/4) / sqrt(gamma) U[:, r:2r]^T

and s B0^T A0 is taken away from the increment, as for every start whose product is not zero.

The vectors are found by randomised subspace iteration (Halko et al., "Finding Structure with Randomness", 2011,
algorithm 4.4), which needs G only in the products G Q and G^T Q with l = min(4 r, m, n) columns. These are sums over
batches and over processes, so G is formed for one weight and one batch at a time, multiplied, and freed: the full
gradients never stand in memory together. Each product takes one pass over the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_lora.adapters import draws
from lightning_lora.hosts.view import reading_plain
from lightning_lora.injection.inject import Place, places

GAMMA = 16
POWER_ITERATIONS = 1
PASSES = 2 + 2 * POWER_ITERATIONS


def start_from_gradients(
    module: nn.Module, losses: Callable[[], Iterable[Tensor]], reduce: Callable[[Tensor], Tensor]
) -> None:
    """Set A and B of every adapter in ``module`` that a gradient reaches; the others keep their start.

    Args:
        module: One that :func:`~lightning_lora.inject` has been through, with ``init="gradient"``.
        losses: Called :data:`PASSES` times; gives the loss of each batch, the same ones each time.
        reduce: The mean of a tensor over processes.
    """
    sketches = [_Sketch(place) for place in {id(place.adapter): place for place in places(module)}.values()]
    for _ in range(PASSES):
        with reading_plain(module):
            _one_pass(sketches, losses)
        for sketch in sketches:
            sketch.turn(reduce)
    for sketch in sketches:
        if (factors := sketch.start()) is not None:
            sketch.adapter.start_from(*factors)


def _one_pass(sketches: list[_Sketch], losses: Callable[[], Iterable[Tensor]]) -> None:
    """Add the gradients of all batches, multiplied, to the sketches."""
    handles = []
    try:
        for sketch in sketches:
            sketch.weight.requires_grad_(True)
            handles.append(sketch.weight.register_post_accumulate_grad_hook(sketch.add))
        with torch.enable_grad():
            for loss in losses():
                loss.backward(inputs=[sketch.weight for sketch in sketches])
    finally:
        for handle in handles:
            handle.remove()
        for sketch in sketches:
            sketch.weight.requires_grad_(False)
            sketch.weight.grad = None


class _Sketch:
    """G Q or G^T Q of one weight, in turns, where Q (orthonormal but for the first) spans the product before."""

    def __init__(self, place: Place) -> None:
        self.adapter = place.adapter
        self.weight = place.weight
        *stack, m, n = self.adapter.as_matrix(place.weight).shape
        columns = min(4 * self.adapter.rank, m, n)
        normal = torch.empty(*stack, n, columns, dtype=torch.float32, device="cpu")
        normal.normal_(generator=draws.generator(self.adapter.key, "gradient"))
        self.Q = normal.to(place.weight.device, torch.promote_types(place.weight.dtype, torch.float32))
        self.transposed = False
        self.product = self.Q.new_zeros(*stack, m, columns)

    def add(self, weight: Tensor) -> None:
        """Take the gradient of one batch off ``weight``."""
        assert weight.grad is not None
        G = self.adapter.as_matrix(weight.grad).to(self.Q.dtype)
        self.product += (G.mT if self.transposed else G) @ self.Q
        weight.grad = None

    def turn(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """End a pass."""
        self.last = reduce(self.product), self.Q
        self.Q = torch.linalg.qr(self.last[0]).Q
        self.transposed = not self.transposed
        sides = self.adapter.as_matrix(self.weight).shape[-2:]
        self.product = self.Q.new_zeros(*self.Q.shape[:-2], sides[self.transposed], self.Q.shape[-1])

    def start(self) -> tuple[Tensor, Tensor] | None:
        """Return A0 and B0, where the last product is G^T Q and G nearly Q (G^T Q)^T; None if no gradient came."""
        product, Q = self.last
        if not product.any():
            return None
        U, _, Vh = torch.linalg.svd(product.mT, full_matrices=False)
        U, r = Q @ U, self.adapter.rank
        scale = U.shape[-2] ** 0.25 / GAMMA**0.5
        return scale * Vh[..., :r, :], scale * U[..., r : 2 * r].mT

"""Where A (r, n) and B (r, m) start, for a weight W0 (m, n). All draws come from the generator given, on the CPU.

==================  =================================================================================================
``zero``            A ~ U(-1/sqrt(n), 1/sqrt(n)), which is ``kaiming_uniform_(a=sqrt(5))``, and B = 0, as in PEFT; for
                    embeddings, whose n is the size of the vocabulary, A = 0 and B ~ N(0, 1)
``symmetric``       both uniform, each by its own side: neither is zero (article, "Optimization Perspective")
``orthogonal``      the rows of A and of B are mixed from two halves of one random rotation of r dimensions, so that
                    B^T A = 0 though neither is zero; r must be even. As in PEFT.
``pissa``           the r largest singular values: W0 = U S V^T, A = sqrt(S/s) V^T, B = sqrt(S/s) U^T. Meng et al.,
                    "PiSSA: Principal Singular Values and Singular Vectors Adaptation" (2024)
``pissa_niter_q``   the same by a randomised SVD with q power iterations (Halko et al., 2011), as in PEFT
``gradient``        from the gradient at the start, in ``gradient_start.py``; ``zero`` until that is known
==================  =================================================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

INITS = ("zero", "symmetric", "orthogonal", "pissa", "pissa_niter_4", "gradient")
"""What ``init`` can be; any number can stand for the 4."""


def is_init(init: object) -> bool:
    """Return whether ``init`` is one of these."""
    return init in INITS or (isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init) is not None)


def is_offset(init: str) -> bool:
    """Return whether the product of A and B is not zero at the start, and is taken away from the increment."""
    return init in ("symmetric", "gradient") or init.startswith("pissa")


def check_start(name: str, init: str, m: int, n: int, rank: int) -> None:
    """Raise ``ValueError`` if ``init`` cannot be had at this rank for the layer ``name``, whose weight is m x n."""
    if init == "orthogonal" and rank % 2:
        raise ValueError(
            f"`init='orthogonal'` needs an even rank, and that of {name!r} is {rank}. Give it {rank + 1}, for this one"
            f" alone by `rank_pattern={{{name!r}: {rank + 1}}}`."
        )
    if init == "gradient" and 2 * rank > min(m, n):
        raise ValueError(
            f"`init='gradient'` takes 2 r singular vectors of the gradient, and the weight of {name!r} is {m} x {n}."
            f" Give it a rank of at most {min(m, n) // 2}, not {rank}, or exclude it."
        )


def start(
    init: str, weight: Tensor, rank: int, scale: float, zero: Sequence[str], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return A (r, n) and B (r, m), float32 at least, for ``weight`` (m, n), or stacks of all three.

    Args:
        init: One of :data:`INITS`.
        weight: W0.
        rank: r.
        scale: s, by which the product of A and B is multiplied.
        zero: Which of ``"A"`` and ``"B"`` are zero in ``init="zero"``.
        generator: Of the draws.
    """
    *stack, m, n = weight.shape

    def uniform(side: int) -> Tensor:
        values = torch.empty(*stack, rank, side, dtype=torch.float32, device="cpu")
        return values.uniform_(-1 / math.sqrt(side), 1 / math.sqrt(side), generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.empty(*stack, *shape, dtype=torch.float32, device="cpu").normal_(generator=generator)

    def zeros(side: int) -> Tensor:
        return torch.zeros(*stack, rank, side, dtype=torch.float32, device="cpu")

    if init == "symmetric":
        return uniform(n), uniform(m)
    if init == "orthogonal":
        rotation, _ = torch.linalg.qr(normal(rank, rank))
        odd, even = rotation[..., 0::2, :], rotation[..., 1::2, :]  # (r/2, r), orthogonal to each other
        return odd.mT @ normal(rank // 2, n) / 10, even.mT @ normal(rank // 2, m) / 10
    if init.startswith("pissa"):
        return _principal(weight, rank, scale, init.removeprefix("pissa").removeprefix("_niter_"), generator)
    if "B" not in zero:
        return zeros(n), normal(rank, m)
    return zeros(n) if "A" in zero else uniform(n), zeros(m)


def _principal(
    weight: Tensor, rank: int, scale: float, niter: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if niter:  # Halko et al., algorithm 4.4, on the smaller side
        tall = weight if weight.shape[-2] >= weight.shape[-1] else weight.mT
        shape = (*tall.shape[:-2], tall.shape[-1], rank)
        Q = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=generator).to(tall)
        Q = torch.linalg.qr(tall @ Q).Q
        for _ in range(int(niter)):
            Q = torch.linalg.qr(tall @ torch.linalg.qr(tall.mT @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.mT @ tall, full_matrices=False)
        U, Vh = (Q @ U, Vh) if tall is weight else (Vh.mT, (Q @ U).mT)
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[..., :rank] / scale).sqrt()[..., None]
    return root * Vh[..., :rank, :], root * U[..., :rank].mT
